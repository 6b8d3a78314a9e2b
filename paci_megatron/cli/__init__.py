"""The command ``paci-megatron``: one module a subcommand, each with ``main(argv, prog)``. They read options and print; what
they do is in the other packages."""
