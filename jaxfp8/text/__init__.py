"""Text: token ids and text, and chats as a model's template writes them.

The template is a program that came with the weights, so a child process renders it. The room refuses to know arrays and
engines. It may import the checkpoint room, for a tokenizer's files, and the vocabulary.
"""
