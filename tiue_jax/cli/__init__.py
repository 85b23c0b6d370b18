"""The command `tiue` and its subcommands: argv to settings, errors to one line, an exit status."""
