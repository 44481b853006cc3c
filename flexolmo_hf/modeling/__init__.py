"""The network: configuration, router, mixture, expert sets, checkpoint files, upcycling."""
