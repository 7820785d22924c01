"""A folder of parts: each measures one thing of a `Setting` and returns a `Table`."""
