"""The commands of the command line, a file a group. Heavy libraries are imported inside the commands."""
