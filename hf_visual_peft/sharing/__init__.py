"""What travels with an adapter: its card, its class names, and the way to the Hub."""
