"""A door: `python -m jaxfp8` is jaxfp8/commands/main.py."""

from jaxfp8.commands.main import main

if __name__ == "__main__":
  main()
