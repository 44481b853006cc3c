"""From text to router rows: domain embeddings, and how alike a model's rows are."""
