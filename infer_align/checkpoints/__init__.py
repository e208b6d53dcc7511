"""Checkpoints of models on disk: their files, their conversion, and the check for missing weights.

Engines, rewards and values load models with transformers. What they share stands here:

    complete.py  refuse a checkpoint that lacks weights
    errors.py    the errors of a folder that cannot be loaded
    gguf.py      read a GGUF file, converted once to a folder that transformers loads quickly
    folders.py   the cache of converted folders
    threads.py   one CPU thread for a small model
    types.py     the types that weights can have
"""
