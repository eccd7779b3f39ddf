"""`dual-policy completion SHELL`: prints the script that lets a shell complete our commands with the Tab key.

What the shell is answered then is in `completing.py`.
"""

from __future__ import annotations

from dual_policy_plugin.commands.words import make_parser, parse_words

SHELLS = ("bash", "zsh", "fish")


def run(words: list[str]) -> int:
    """Prints the script for a shell; gives 0."""
    parser = make_parser(
        "dual-policy completion",
        "{bash,zsh,fish}",
        "Prints a script. Once a shell has read it, the Tab key completes commands, options, files and, for train, "
        "the groups and keys of the config.",
        examples=(
            'eval "$(dual-policy completion bash)"   # in ~/.bashrc',
            'eval "$(dual-policy completion zsh)"    # in ~/.zshrc, behind compinit',
            "dual-policy completion fish | source    # in ~/.config/fish/config.fish",
        ),
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    args = parse_words(parser, words)

    from argcomplete.shell_integration import shellcode

    print(shellcode(["dual-policy"], shell=args.shell), end="")
    return 0
