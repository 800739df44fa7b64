"""Draft heads written out plainly from their papers: no cache, no batch, causal masks only.

A head is run whole over a list of pairs each time, in float64. Pair i joins token t_{i+1} with a
feature and stands at rotary position i; its output stands in for feature i + 1 and predicts token
t_{i+2}. What is read of the tested code is the names of the published tensors.
"""

import math

import torch
from torch.nn.functional import silu


def frequencies(parameters, head_dim):
    """Angles per position [head_dim / 2] and the factor on sines and cosines."""
    base, kind = parameters["rope_theta"], parameters["rope_type"]
    plain = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "default":
        return plain, 1.0
    factor = parameters["factor"]
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    trained = parameters["original_max_position_embeddings"]
    if kind == "llama3":
        return [_llama3(f, factor, trained, parameters) for f in plain], 1.0
    assert kind == "yarn"
    # Peng et al., arXiv 2309.00071: turns over the trained length decide what is interpolated.
    first, last = (
        head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (32, 1)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    ramp = [min(max((i - first) / (last - first), 0), 1) for i in range(head_dim // 2)]
    mixed = [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    return mixed, 0.1 * math.log(factor) + 1


def _llama3(frequency, factor, trained, parameters):
    turns = trained * frequency / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if turns > high:
        return frequency
    if turns < low:
        return frequency / factor
    share = (turns - low) / (high - low)
    return (1 - share) * frequency / factor + share * frequency


def rms_norm(states, weight, eps):
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


class SlowLayer:
    """A Llama decoder layer's attention and MLP on one sequence [n, .]."""

    def __init__(self, tensors, prefix, config, rope):
        self._tensors, self._prefix = tensors, prefix
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.rope = rope

    def tensor(self, name):
        return self._tensors[f"{self._prefix}.{name}"]

    def linear(self, name, states):
        bias = self._tensors.get(f"{self._prefix}.{name}.bias", 0)
        return states @ self.tensor(f"{name}.weight").T + bias

    def norm(self, name, states):
        return rms_norm(states, self.tensor(f"{name}.weight"), self.eps)

    def _rotated(self, states, positions):
        """Rotate [n, heads, head_dim]: entry j of the first half pairs with j of the second."""
        angles, factor = frequencies(self.rope, self.head_dim)
        turned = torch.tensor(positions)[:, None].double() * torch.tensor(angles).double()
        cos, sin = turned.cos()[:, None] * factor, turned.sin()[:, None] * factor
        first, second = states.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attention(self, states, positions, sees):
        """Attention output [n, H]; sees(i, j) says whether entry i looks at entry j."""
        size = len(states)
        queries, keys, values = (
            self.linear(f"self_attn.{name}_proj", states).view(size, -1, self.head_dim)
            for name in "qkv"
        )
        if f"{self._prefix}.self_attn.q_norm.weight" in self._tensors:
            queries, keys = (
                self.norm("self_attn.q_norm", queries),
                self.norm("self_attn.k_norm", keys),
            )
        queries, keys = self._rotated(queries, positions), self._rotated(keys, positions)
        mask = torch.tensor([[sees(i, j) for j in range(size)] for i in range(size)])
        outputs = []
        for head in range(self._heads):
            shared = head // (self._heads // self._kv_heads)
            scores = queries[:, head] @ keys[:, shared].T / math.sqrt(self.head_dim)
            weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
            outputs.append(weights @ values[:, shared])
        return self.linear("self_attn.o_proj", torch.cat(outputs, -1))

    def mlp(self, states):
        gate = silu(self.linear("mlp.gate_proj", states))
        return self.linear("mlp.down_proj", gate * self.linear("mlp.up_proj", states))


def _doubled(module):
    return {name: tensor.double() for name, tensor in module.state_dict().items()}


class SlowEagle:
    """EAGLE-1: fc(embedding, feature), a layer without its first norm, the target's projection."""

    ids = None

    def __init__(self, head, target_model, rope=None):
        tensors = _doubled(head)
        rope = rope or target_model.config.rope_parameters
        self._fc = tensors["fc.weight"], tensors.get("fc.bias", 0)
        self._layer = SlowLayer(tensors, "layers.0", head.config, rope)
        self._embedding = target_model.get_input_embeddings().weight.detach().double()
        self._projection = target_model.get_output_embeddings().weight.detach().double()
        self._tap = target_model.config.num_hidden_layers

    def fuse(self, hidden):
        return hidden[self._tap].double()

    def run(self, tokens, features, positions, sees):
        """Outputs [n, H] of all pairs."""
        weight, bias = self._fc
        states = torch.cat([self._embedding[tokens], features], -1) @ weight.T + bias
        states = states + self._layer.attention(states, positions, sees)
        return states + self._layer.mlp(self._layer.norm("post_attention_layernorm", states))

    def logits(self, output):
        return output @ self._projection.T

    def carry(self, output):
        return output


class SlowMtp:
    """MTP: normed token and normed state are projected into a whole decoder layer, and normed."""

    ids = None

    def __init__(self, head, target_model, rope=None):
        tensors = _doubled(head)
        rope = rope or target_model.config.rope_parameters
        self._layer = SlowLayer(tensors, "mtp_layers.0", head.config, rope)
        self._embedding = target_model.get_input_embeddings().weight.detach().double()
        self._projection = target_model.get_output_embeddings().weight.detach().double()
        self._tap = target_model.config.num_hidden_layers

    def fuse(self, hidden):
        return hidden[self._tap].double()

    def run(self, tokens, features, positions, sees):
        """Outputs [n, H] of all pairs, behind the final norm."""
        layer = self._layer
        embedded = layer.norm("token_layernorm", self._embedding[tokens])
        pairs = torch.cat([embedded, layer.norm("hidden_layernorm", features)], -1)
        states = layer.linear("input_proj", pairs)
        normed = layer.norm("input_layernorm", states)
        states = states + layer.attention(normed, positions, sees)
        states = states + layer.mlp(layer.norm("post_attention_layernorm", states))
        return layer.norm("final_layernorm", states)

    def logits(self, output):
        return output @ self._projection.T

    def carry(self, output):
        return output


class SlowMtpModules(SlowMtp):
    """MTP with a module for each depth: module k reads module k - 1 at the same place of the text.

    No drafted feature is read, so the number of those says which module's turn it is.
    """

    def __init__(self, head, target_model, rope=None):
        super().__init__(head, target_model, rope)
        names = {name.split(".")[1] for name in head.state_dict()}
        self._modules = [
            SlowLayer(_doubled(head), f"mtp_layers.{module}", head.config, self._layer.rope)
            for module in range(len(names))
        ]

    def run(self, tokens, features, positions, sees):
        depth = int(features.isnan().any(1).sum())
        places = range(len(tokens) - depth)
        states = features[: len(places)]
        for module in range(depth + 1):
            self._layer = self._modules[module]
            states = super().run(tokens[module:][: len(places)], states, places, sees)
        return states

    def carry(self, output):
        return torch.full_like(output, math.nan)


class SlowMixture:
    """Mixture of Attentions: the target's layers are mixed, then attended to from the drafter.

    Feature i is of token i - 1 and stands beside token i; NaN where there is none: before the first
    token, and beside drafts.
    """

    ids = None

    def __init__(self, head, target_model, rope=None, **flags):
        self._tensors = tensors = _doubled(head)
        rope = rope or target_model.config.rope_parameters
        options = head.options
        self._own = SlowLayer(tensors, "self_attention", options.backbone, rope)
        self._cross = SlowLayer(tensors, "cross_attention", options.cross, rope)
        self._layers = SlowLayer(tensors, "layer_self_attention", options.layers, rope)
        self._flags = {"layer_self_attention": True, "cross_attention": True, **flags}
        own = _doubled(target_model)
        count = target_model.config.num_hidden_layers
        self._last = [
            SlowLayer(own, f"model.layers.{place}", target_model.config, rope)
            for place in range(count - flags.get("target_layers", 0), count)
        ]
        self._final = own["model.norm.weight"], target_model.config.rms_norm_eps
        self._embedding = target_model.get_input_embeddings().weight.detach().double()
        self._projection = target_model.get_output_embeddings().weight.detach().double()
        self._num_layers = target_model.config.num_hidden_layers

    def fuse(self, hidden):
        """States [n + 1, H] beside tokens 0 .. n."""
        weight, bias = self._tensors.get("Ekv2E.weight"), self._tensors.get("Ekv2E.bias")
        if not self._flags["cross_attention"]:
            num_tokens = len(next(iter(hidden.values())))
            return torch.full((num_tokens + 1, self._embedding.shape[1]), math.nan).double()
        rows = []
        for states in hidden[-1].double():
            states = states.view(self._num_layers, -1)
            if self._flags["layer_self_attention"]:
                states = self._block(self._layers, states, range(len(states)), lambda i, j: True)
            rows.append(states.mean(0) @ weight.T + bias)
        return torch.stack([torch.full_like(rows[0], math.nan), *rows])

    def _block(self, layer, states, positions, sees):
        normed = layer.norm("input_layernorm", states)
        states = states + layer.attention(normed, positions, sees)
        return states + layer.mlp(layer.norm("post_attention_layernorm", states))

    def run(self, tokens, features, positions, sees):
        """Outputs [n, H] of all entries."""
        states = self.embedded(tokens, positions, sees)
        if self._flags["cross_attention"]:
            states = self.crossed(states, features, positions, sees)
        return self.finished(states, positions, sees)

    def embedded(self, tokens, positions, sees):
        return self._block(self._own, self._embedding[tokens], positions, sees)

    def finished(self, states, positions, sees):
        for layer in self._last:
            states = self._block(layer, states, positions, sees)
        return rms_norm(states, *self._final) if self._last else states

    def crossed(self, states, features, positions, sees):
        layer, known = self._cross, ~features.isnan().any(-1)
        both = torch.cat([states, features.nan_to_num()])
        places = [*positions, *[place - 1 for place in positions]]
        size = len(states)

        def attends(i, j):
            if i >= size:  # padding looks at itself
                return i == j
            return j >= size and sees(i, j - size) and bool(known[j - size])

        normed = layer.norm("input_layernorm", both)
        found = layer.attention(normed, places, attends)[:size]
        # Entries that see nothing have no attention.
        reached = [any(attends(i, j) for j in range(size, 2 * size)) for i in range(size)]
        states = states + torch.where(torch.tensor(reached).unsqueeze(1), found, 0)
        return states + layer.mlp(layer.norm("post_attention_layernorm", states))

    def logits(self, output):
        return output @ self._projection.T

    def carry(self, output):
        return torch.full_like(output, math.nan)


class SlowEagle3:
    """EAGLE-3: three fused taps, token and feature side by side in attention, own vocabulary."""

    def __init__(self, head, target_model, taps, rope=None, **norms):
        self._tensors = tensors = _doubled(head)
        rope = rope or target_model.config.rope_parameters
        self._layer = SlowLayer(tensors, "midlayer", head.config, rope)
        names = {".".join(name.split(".")[:2]) for name in tensors if name.startswith("layers.")}
        self._further = [SlowLayer(tensors, name, head.config, rope) for name in sorted(names)]
        self._taps, self._norms = taps, norms
        shared = target_model.get_input_embeddings().weight.detach().double()
        self._embedding = tensors.get("embed_tokens.weight", shared)
        self.ids = None
        if "d2t" in tensors:
            offsets = head.state_dict()["d2t"].tolist()
            self.ids = [draft_id + offset for draft_id, offset in enumerate(offsets)]

    def _norm(self, name, states):
        return rms_norm(states, self._tensors[f"{name}.weight"], self._layer.eps)

    def fuse(self, hidden):
        return self.joined([hidden[tap].double() for tap in self._taps])

    def joined(self, taps):
        if self._norms.get("fc_norm"):
            taps = [self._norm(f"fc_norm.{place}", tap) for place, tap in enumerate(taps)]
        joined = torch.cat(taps, -1)
        if self._norms.get("norm_before_fc"):
            joined = self._norm("input_norm", joined)
        return joined @ self._tensors["fc.weight"].T

    def run(self, tokens, features, positions, sees):
        """Outputs [n, H] of all pairs, before the final norm."""
        layer = self._layer
        normed = layer.norm("hidden_norm", features)
        pairs = torch.cat([layer.norm("input_layernorm", self._embedding[tokens]), normed], -1)
        residual = normed if self._norms.get("norm_before_residual") else features
        states = residual + layer.attention(pairs, positions, sees)
        states = states + layer.mlp(layer.norm("post_attention_layernorm", states))
        for further in self._further:
            normed = further.norm("input_layernorm", states)
            states = states + further.attention(normed, positions, sees)
            states = states + further.mlp(further.norm("post_attention_layernorm", states))
        return states

    def logits(self, output):
        return self._norm("norm", output) @ self._tensors["lm_head.weight"].T

    def carry(self, output):
        return self._norm("norm", output) if self._norms.get("norm_output") else output


class SlowPeagle(SlowEagle3):
    """P-EAGLE: behind the root every pair is the mask token and the learned state."""

    def __init__(self, head, target_model, taps, rope=None, **norms):
        super().__init__(head, target_model, taps, rope, **norms)
        self._mask = head.options.mask_token_id

    def shown(self, path):
        return [self._mask] * len(path)

    def carry(self, output):
        return self.joined(self._tensors["mask_hidden"][0, 0].chunk(len(self._taps)))


class Continuation:
    """Logits of a slow head after committed tokens t_0 .. t_n and the features of the first n."""

    def __init__(self, head, committed, features):
        self._head = head
        # A head that has a state for the first token too reads one pair more.
        self._tokens, self._features = list(committed[-len(features) :]), features
        self._outputs = {}

    def output(self, path=()):
        """The output [F] behind the root (empty path) or behind a path of drafted tokens."""
        if path not in self._outputs:
            tokens = [*self._tokens, *getattr(self._head, "shown", tuple)(path)]
            drafted = [self._head.carry(self.output(path[:end])) for end in range(len(path))]
            features = torch.cat([self._features, *[row[None] for row in drafted]])
            outputs = self._head.run(tokens, features, range(len(tokens)), lambda i, j: j <= i)
            self._outputs[path] = outputs[-1]
        return self._outputs[path]

    def logits(self, path=()):
        """Target id -> logit, of the tokens that the head can say."""
        values = self._head.logits(self.output(path)).tolist()
        return dict(zip(self._head.ids or range(len(values)), values, strict=True))


class MedusaGuesses:
    """Logits of Medusa's heads after the feature [H] of a text: it depends on the depth only."""

    def __init__(self, heads, target_model, feature):
        self._tensors = _doubled(heads)
        ids = heads.state_dict().get("draft_ids")
        self._ids = None if ids is None else ids.tolist()
        self._projection = target_model.get_output_embeddings().weight.detach().double()
        self._feature = feature.double()

    def logits(self, path=()):
        """Target id -> logit of head len(path)."""
        tensors, head, states = self._tensors, len(path), self._feature
        block = 0
        while f"blocks.{head}.{block}.linear.weight" in tensors:
            name = f"blocks.{head}.{block}.linear"
            states = states + silu(tensors[f"{name}.weight"] @ states + tensors[f"{name}.bias"])
            block += 1
        assert block
        projection = tensors.get(f"vocab_heads.{head}.weight", self._projection)
        values = (projection @ states).tolist()
        return dict(zip(self._ids or range(len(values)), values, strict=True))


class BlockGuesses:
    """Logits of a block head behind the features {tap: [n, H]} of a text and its root.

    The block attends to the features, whose keys and values come of no norm but their own, and to
    itself; a Markov head adds what the token before says.
    """

    def __init__(self, head, target_model, hidden, root, rope=None):
        self._tensors, options = _doubled(head), head.options
        rope = rope or target_model.config.rope_parameters
        joined = torch.cat([hidden[tap].double() for tap in head.taps], -1)
        layers = [
            SlowLayer(self._tensors, f"layers.{index}", head.config, rope)
            for index in range(options.num_layers)
        ]
        self._eps, self._root = layers[0].eps, root
        context = self._norm("hidden_norm", joined @ self._tensors["fc.weight"].T)
        embedding = target_model.get_input_embeddings().weight.detach().double()
        embedding = self._tensors.get("embed_tokens.weight", embedding)
        states = embedding[[root, *[options.mask_token_id] * (options.block_size - 1)]]
        size, width = len(context), options.block_size

        def sees(i, j):
            if i < size or j < size:  # what a feature sees is never looked at
                return j < size
            return j <= i or not options.causal

        for layer in layers:
            both = torch.cat([context, layer.norm("input_layernorm", states)])
            states = states + layer.attention(both, range(size + width), sees)[size:]
            states = states + layer.mlp(layer.norm("post_attention_layernorm", states))
        outputs = self._norm("norm", states)
        self._outputs = outputs if options.sample_from_anchor else outputs[1:]
        self._kind = options.markov
        projection = target_model.get_output_embeddings().weight.detach().double()
        self._projection = self._tensors.get("lm_head.weight", projection)

    def _norm(self, name, states):
        return rms_norm(states, self._tensors[f"{name}.weight"], self._eps)

    def logits(self, path=()):
        """Target id -> logit of level len(path)."""
        tensors, output = self._tensors, self._outputs[len(path)]
        logits = self._projection @ output
        if self._kind:
            word = tensors["markov_head.markov_w1.weight"][path[-1] if path else self._root]
            if self._kind == "gated":
                weight, bias = (
                    tensors[f"markov_head.gate_proj.{name}"] for name in ("weight", "bias")
                )
                word = word * (weight @ torch.cat([output, word]) + bias).sigmoid()
            logits = logits + tensors["markov_head.markov_w2.weight"] @ word
        return dict(enumerate(logits.tolist()))
