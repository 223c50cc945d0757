"""The adapter: its settings, its methods, its PEFT files."""
