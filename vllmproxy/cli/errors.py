"""What can go wrong in a command."""


class CommandError(Exception):
    """The command cannot be done; its text says in a sentence what is wrong and what to do."""
