"""Generation: sampling and acceptance as arithmetic on probabilities, and the loop that carries the state.

`lepton.Lepton` has it as methods; `lepton.generate.completion.complete` is what they call.
"""
