"""The commands of `jaxfp8`, one module each, and everything that they share. All flags of the package are defined here.

    main       the names of the commands
    command    parsing, errors, exit codes, signals; command_help writes the help texts
    streams    stdin, stdout, stderr and locales; platforms chooses devices; prompt_files reads prompts
    generate   answers prompts (answers: printing and conversation); chat is its interactive form
    plan, convert, inspect, export, calibrate, evaluate, benchmark, compile, validate_gpu, env

A module loads jax inside its `main` alone. This room may import every other room; no room imports it. It refuses to compute:
commands read flags, call the rooms above, and print. The working directory is left first of all (search_path.py).
"""

from jaxfp8 import search_path

search_path.leave_working_directory()
