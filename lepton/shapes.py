"""The letters of shape suffixes, one meaning each in the whole package.

A tensor's name ends with its shape: `x_BTD` is [rows, tokens, width]. Letters stand for sizes, digits for themselves:
`signals_M3` is [M, 3], `last_B1` is [B, 1]. Within one function a letter has one size. A tensor of a shape that the
letters cannot say, such as two widths side by side, has no suffix; its docstring says the shape. `tests/test_shapes.py`
checks all of this.
"""

LETTERS = {
    "A": "rows that take part: some of the B",
    "B": "rows of a batch, one sequence each",
    "C": "slots: kv entries in addition to those of tokens, for crystals and thoughts",
    "D": "width of the residual stream",
    "E": "width of the token embedding",
    "F": "width of what an idea lets later ideas read",
    "G": "segments of a chunk: those that open in it, where needed with the one open on entry in front",
    "H": "width of a head's queries and keys, and of its values in attention",
    "I": "width of the inputs of an idea's own layers",
    "J": "kv entries or tokens in all: R remembered, T of the chunk, and in attention the C slots after them",
    "K": "key/value heads",
    "L": "layers",
    "M": "positions: B x T flattened, or those that are picked from it",
    "N": "heads (query heads in attention)",
    "O": "tokens or positions of one chunk, in operations that work chunk by chunk",
    "P": "chunks of such an operation",
    "Q": "queries of a block of queries, or of thoughts",
    "R": "tokens remembered from before the chunk",
    "S": "thoughts of a segment",
    "T": "tokens of the chunk that a pass reads",
    "U": "width of a head's values in the working memory",
    "V": "vocabulary; with its padding for rows of the embedding and their products; in sampling also the drafter's",
    "W": "width of the drafter's cell",
    "X": "token ids that a crystal carries",
    "Y": "drafts of a row",
    "Z": "tokens that the drafter can propose",
}
