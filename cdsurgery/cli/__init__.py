"""The command `cdsurgery`: one file a command, `main` finds them."""
