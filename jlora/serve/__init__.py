"""Answering with a base model and adapters: loading, generation, output rules, chat in the terminal."""
