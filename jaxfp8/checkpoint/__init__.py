"""Checkpoints: opens, reads, converts, writes, exports and caches the weights of a model.

    open_checkpoint(path)  ->  Checkpoint or another Source  ->  load  ->  Llama with arrays

Read `open`, `manifest`, `layout` and `load` in this order. A checkpoint is opened and parsed once; the opened object is handed
along. `readers/`, `tokenizer_files`, `manifest`, `open` and `stored_arrays` load no jax. This room knows the model's modules,
whose arrays it fills. It refuses to know engines, text and flags. It may import inspection, model, planning and the vocabulary.
"""
