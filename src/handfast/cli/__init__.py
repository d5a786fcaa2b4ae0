"""The commands: one thin file each. Importing this imports no framework."""
