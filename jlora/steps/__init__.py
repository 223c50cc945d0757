"""The compiled steps: loss, optimizer, training and evaluation step."""
