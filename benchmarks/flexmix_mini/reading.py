"""How the figures are to be read: words, no numbers."""

READING = """
What carries over to this size: merging is better than the public model, the soup, BTX and plugged-in dense networks;
router tuning on public proxies helps more than anything else that is done after training, and gives back most of what
public text had lost; an expert that is left out takes its own domain's gain with it, and little else.

What does not: BTM is far ahead on single domains. *Where it is lost* shows why, rung by rung:

- **Frozen embeddings, attention, norms and head.** A dense model that trains its feed-forward networks alone stays well
  above one that trains everything, and an expert beside the frozen public one reaches about what these networks reach.
  A model of this size, trained for a few minutes, has poor embeddings and attention for domains it has hardly seen, and
  an expert can mend neither. A 7B model after a trillion tokens has no such gap to close. A vocabulary of a few hundred
  tokens and wide feed-forward networks, as here, narrow the gap; a larger one widened it in a preliminary run.
- **Routing.** With public and own expert alone, the merged model is what its owner trained. With all experts on, tokens
  of one domain reach experts that have never met them, since each owner's router row has only ever been held against
  public text. Tuning brings back part of it. The rest is a matter of what a linear router can see: one token's state,
  in a model whose attention was never trained to say which kind of document this is. BTM sees the document so far, and
  domains as clean as these are known after a sentence. Proxies are not what limits: a router tuned on the owners' own
  text, which nobody may have, is hardly better than one tuned on theirs, nor do four times the tokens help much.
- **Mixed documents** narrow the distance, as one would expect of routing by token against weights by document: what
  BTM wins by knowing the document it wins less of there.
- **The bar is high here.** Training a mixture on everybody's text together, all parameters free, is what data owners
  cannot do. With the same compute as one owner's share it comes out about where FlexOlmo with router tuning does, and
  even with all the owners' tokens it does no more than reach BTM on the mean of all. An ensemble of small whole models
  is strong where each domain is all that its model has to know, and costs as many models to hold and to run; the paper
  compares models that have long seen every domain.

What preliminary runs on validation text suggested, whose figures are not kept here (one seed, two owners, and some
changed two settings at once): a higher learning rate makes an expert better alone and worse merged without tuning,
while with tuning the higher one won; contrast rows merged better than means of hidden states, after tuning too. The
choices of the study rest on them. Rows from a sentence encoder, as the paper has them, are compared only where the
table has a row for them. Answers of benchmarks are measured in bits per byte, since models of this size are at chance
on their letters.
"""
