"""Generation: prompts in, texts out, on the engine of `lepton.engine`.

`lepton.Lepton` has it as methods; `lepton.generate.completion.complete` is what they call. `sampling` holds the slow
fp64 reference of how probabilities are cut.
"""
