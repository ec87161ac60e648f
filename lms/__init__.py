"""Language models, their questions and the answers read from them."""
