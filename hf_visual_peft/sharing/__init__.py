"""What is published with an adapter: its model card, its files, and the upload to the Hub."""
