"""A public model and dense models of its owners, on disk, with everything different that can differ."""

from types import SimpleNamespace

from tests.conftest import byte_tokenizer, dense_model

TEXT = [f"row {number} " + "abc " * (number % 7) for number in range(24)]


def dense_owners(folder, *names, **changes):
    """Write a dense public model and one dense model per name; none shares a tensor with another."""
    tokenizer = byte_tokenizer()
    models, paths = {}, {}
    for name in ("public", *names):
        models[name] = dense_model(vocab_size=len(tokenizer), **changes)
        paths[name] = folder / f"dense-{name}"
        models[name].save_pretrained(paths[name])
    tokenizer.save_pretrained(paths["public"])
    anchor = paths.pop("public")
    return SimpleNamespace(anchor=anchor, experts=paths, models=models, tokenizer=tokenizer)
