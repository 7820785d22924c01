"""An artifact -> folders of a Triton model repository: `repository` writes them, `serving` runs in the server."""
