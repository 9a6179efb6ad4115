"""The command line: table jobs as files, and a look at what is there."""
