"""Published: how other people hand on what they did to a model. One file for each family of layouts.

`cli.weights.read_edit` finds out which it is. `names` knows what layouts call a pipeline's weights; `state_dicts` reads
weights by their names, `adapters` LoRAs and the like, `folders` models in diffusers' layout, `neurons` NeMo's tables.
"""
