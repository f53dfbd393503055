"""The command ``int8fx``: the only folder that imports transformers, rich or matplotlib."""
