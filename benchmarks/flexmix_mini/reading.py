"""How the figures are to be read: words, no numbers. They are read anew whenever the results change."""

READING = """
What carries over to this size: merging is better than the public model and the soup, on single domains and on mixed
documents; router tuning on public proxies helps more than anything else that is done after training, and gives back
most of what public text had lost; an expert that is left out takes its own domain's gain with it, and little else.
Merging is better than BTX and than plugged-in dense networks on single domains, most of all on math, but not on mixed
documents before its router is tuned.

What does not: BTM is far ahead on single domains. *Where it is lost* shows why, rung by rung:

- **The other owners' experts.** With public and own expert alone, the merged model is what its owner trained. With all
  experts on, tokens of one domain reach experts that have never met them, since each owner's router row has only ever
  been held against public text. That costs as much as anything else. Tuning brings back part of it. The rest is a
  matter of what a linear router can see: one token's state, in a model whose attention was never trained to say which
  kind of document this is. BTM sees the document so far, and domains as clean as these are known after a sentence.
  Proxies are not what limits: a router tuned on the owners' own text, which nobody may have, is hardly better than one
  tuned on theirs, nor do four times the tokens help much.
- **Frozen embeddings, attention, norms and head.** A dense model that trains its feed-forward networks alone stays
  above one that trains everything, far above on math and code, and an expert beside the frozen public one comes near
  what these networks reach. A model of this size, trained for a few minutes, has poor embeddings and attention for
  domains it has hardly seen, and an expert can mend neither. A 7B model after a trillion tokens has no such gap to
  close. A vocabulary of a few hundred tokens and wide feed-forward networks, as here, narrow the gap; a larger one
  widened it in a preliminary run.
- **The bar is high here.** Training a mixture on everybody's text together, all parameters free, is what data owners
  cannot do. With as much computing as the owners' experts took it ends near FlexOlmo with router tuning, and with as
  much text it is still no better than BTM on single domains. An ensemble of small whole models is strong where each
  domain is all that its model has to know, and it costs as many models to hold and to run; the paper compares models
  that have long seen every domain.
- **Mixed documents** show the other side. Where sentences of two domains take turns, choosing by token with a tuned
  router comes near weighing whole models by document, four experts nearer than eight. The distance is left where most
  of the document is one owner's after all: commented code, and papers with formulas.

The method here starts its routers from contrast rows, which tell an owner's tokens from public ones. The paper's rows,
from a sentence encoder, are in the table by themselves: here they are no better than random rows, and worse than means
of the public model's own hidden states. A projection of a sentence's embedding has nothing to do with the states that
the router multiplies it by, until training has turned it; at this size training is short. Keeping the negative bias at
inference is clearly better than dropping it; having it in training at all makes no difference that one seed can tell.

Prompt routing has a chat model of a hundred million parameters, which hardly ever chooses the right expert from the
beginning of a text; *What prompt routing chooses* has the counts. It says little about larger ones.

What preliminary runs on validation text suggested, whose figures are not kept here (one seed, two owners, and some
changed two settings at once): a higher learning rate makes an expert better alone and worse merged without tuning,
while with tuning the higher one won; contrast rows merged better than means of hidden states, after tuning too. Answers
of benchmarks are measured in bits per byte, since models of this size are at chance on their letters.
"""
