"""One file a verb of `python -m train`; verbs never import each other."""
