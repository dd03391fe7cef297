"""Text: encoding and decoding of text, and chats in the format of a model's template.

The template is a program that came with the weights, so a child process renders it. The room refuses to know arrays and
engines. It may import the checkpoint room, for a tokenizer's files, and the vocabulary.
"""
