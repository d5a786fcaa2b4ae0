"""``python -m handfast``: the commands, where the script is not on the path."""

from handfast.cli.main import app

app(prog_name="handfast")
