"""How the figures are to be read: words, no numbers. They are read anew whenever the results change."""

READING = """
What carries over to this size: merging is better than the public model and the plain soup, on the mean of single
domains and on mixed documents; router tuning on public proxies helps more than anything else that is done after
training, and gives back most of what public text had lost; an expert that is left out takes its own domain's gain with
it, and little else. On the mean of single domains merging is better than BTX and than plugged-in dense networks, but
math decides that: both are better on public text and on code, commented code among them. Once the router is tuned both
are behind on everything but public text.

What does not: BTM is far ahead on single domains, and the weighted soup ahead as well, before and after router tuning.
*Where it is lost* shows why, rung by rung, with the first seed:

- **The other owners' experts.** With public and own expert alone, the merged model is what its owner trained. With all
  experts on, tokens of one domain reach experts that have never met them, since each owner's router row has only ever
  been held against public text. That costs more than any other rung. Tuning brings back most of it for code, and less
  than half for math and howto. The rest is a matter of what a linear router can see: one token's state, in a model
  whose attention was never trained to say which kind of document this is. BTM sees the document so far, and domains as
  clean as these are known after a sentence. Proxies are not what limits: a router tuned on the owners' own text, which
  nobody may have, is a little better on code, hardly on howto, and not on math; nor do four times the tokens help much.
- **Frozen embeddings, attention, norms and head.** A dense model that trains its feed-forward networks alone stays
  above one that trains everything, far above on math and code, and an expert beside the frozen public one comes near
  what these networks reach. A model of this size, trained for a few minutes, has poor embeddings and attention for
  domains it has hardly seen, and an expert can mend neither. A 7B model after a trillion tokens has no such gap to
  close. A vocabulary of a few hundred tokens and wide feed-forward networks, as here, narrow the gap; a larger one
  widened it in a preliminary run.
- **The bar is high here.** Training a mixture on everybody's text together, all parameters free, is what data owners
  cannot do. With as much computing as the owners' experts took it ends near FlexOlmo with router tuning, a little ahead
  with every seed, on mixed documents by more than chance. With as much text it is clearly better than that, and better
  than BTM on mixed documents, but still not on single domains. An ensemble of small whole models is strong where each
  domain is all that its model has to know, and it costs as many models to hold and to run; the paper compares models
  that have long seen every domain.
- **Mixed documents** show the other side. Where sentences of two domains take turns, choosing by token with a tuned
  router comes near weighing whole models by document, four experts nearer than eight. The distance stays where most of
  the document is one owner's after all: commented code, and papers with formulas.

The method here starts its routers from contrast rows, which tell an owner's tokens from public ones. Without tuning
they do better than any others in the table, on single domains and on mixed documents. The paper's rows, from a sentence
encoder, are there by themselves: they cannot be told from random rows, which go without a bias, and on single domains
they are worse than means of the public model's own hidden states. A projection of a sentence's embedding has nothing to
do with the states that the router multiplies it by, until training has turned it; at this size training is short.
Keeping the negative bias at inference is clearly better than dropping it. Having it in training at all makes less of a
difference than another seed does: with every seed public text and math are a little better for it, and code a little
worse.

Prompt routing has a chat model of a hundred million parameters, which chooses the right expert for hardly any of the
owners' texts from their beginning; *What prompt routing chooses* has the counts. It ends no better than the public
model, which says little about larger chat models.

*What was tried on validation text* has one seed and two owners. Experts that learn slower are better merged as they
are, and worse once the router is tuned; nothing else that was tried moves the tuned model as far, other rows included.
Alone, experts were better with the higher rate in preliminary runs, whose figures are not kept here. Answers of
benchmarks are measured in bits per byte, since models of this size are at chance on their letters.
"""
