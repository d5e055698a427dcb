"""One file per subcommand: parse, build one config, call one core function, show its result."""
