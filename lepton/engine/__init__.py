"""The decoding engine: sequences join and leave, one pass a cycle serves all of them.

sequence     one text being generated
scheduler    which sequences run in the next cycle
speculation  how many tokens are drafted
lookup       drafts from the text itself, where it repeats
pool         the states of all sequences, in place
runner       the model on its device: reads prompts, runs cycles
engine       schedule, launch, read the cycle before
"""
