"""The shipped vocabulary, ``small.json``, and the text it is trained on."""
