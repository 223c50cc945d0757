"""Evaluation: are an adapter's answers better than the base model's, what did it forget, what does it recite?"""
