"""The command line: parse, call, print."""

from counterpoise.cli.app import main as main
