"""The hypernetwork: from an instruction to an adapter for a frozen T5.

    instruction a ─► frozen encoder ─► I_x ─► pooling per site ─► MLP_l ─► lora_A, lora_B    (Eq. 2)
                                        ├──► cross-attention in every encoder block  (Eq. 1, part 1)
                                        └──► decoder attends over (I_x ; encoder output)  (part 2)

Generation is a pure function of the instruction's states. Its output starts at zero: step 0 is the
frozen LLM, whose decoder reads I_x too where part 2 is on. Its weights are never written; what is
the student's own works in hooks within `adapted()`. Outside, the same object is the frozen LLM.

    K  instructions (tasks)   S  instruction tokens   P  sites (layer, projection)  r  LoRA rank
    N  instances              T  input tokens         L  layers in a group          J  projections
    C  target tokens          V  vocabulary           W  generator width            G  bottleneck
    D  d_model                H  attention heads      M  target positions that count, or choices
"""
import contextlib
import threading

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

import common
import config
import data
import lora
import t5
from bench import recorded, texts
from common import UserError
from lora import Adapter


class Generator(nn.Module):
    """Eq. 2: LoRA_l = MLP_l(I_x, idx), an MLP for each layer l, shared by its projections.

    sites: {name: (D_in, D_out)}. How I_x (S × D) becomes a vector is not in the paper. pooling
    "attention": a learned query for each site, which stands for idx too, attends over the tokens;
    "mean": the released code's tanh(Linear(mean of first + last states)), over real tokens only,
    plus a learned embedding of idx.
    """

    def __init__(self, sites, d_model, r, pooling="attention", width=128, bottleneck=128, heads=4):
        super().__init__()
        self.r, self.pooling, self.heads = r, pooling, heads
        self.site_shapes = dict(sites)
        self.site_embedding = nn.Parameter(torch.empty(len(sites), width))  # idx, or the query
        if pooling == "attention":
            if width % heads:
                raise UserError(f"--width {width} is not a multiple of {heads}, the generator's "
                                "attention heads")
            self.memory = nn.Linear(2 * d_model, width)
            self.memory_norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.ff_norm = nn.LayerNorm(width)
            self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(),
                                    nn.Linear(2 * width, width))
        else:
            self.pool = nn.Linear(d_model, width)
        self.norm = nn.LayerNorm(width)

        # A layer's projections of one shape share an MLP: (layer, shape) -> names of its sites.
        layers = {}
        for name, shape in sites.items():
            layers.setdefault((name.rpartition(".")[0], shape), []).append(name)
        # Layers whose projections look alike form a group, and a group's MLPs run as one batched
        # product: (shape, projections) -> [names of a layer's sites].
        groups = {}
        for (_, shape), names in layers.items():
            projections = tuple(name.rpartition(".")[2] for name in names)
            groups.setdefault((shape, projections), []).append(names)
        place = {name: n for n, name in enumerate(sites)}       # site -> its row of site_embedding
        self.groups, self.mlps = [], nn.ModuleList()
        for ((D_in, D_out), projections), layers in groups.items():
            index = torch.tensor([[place[name] for name in names] for names in layers])     # (L, J)
            self.groups.append((D_in, D_out, layers, index))
            L, J, out = len(layers), len(projections), r * (D_in + D_out)
            self.mlps.append(nn.ParameterDict({
                "w1": torch.empty(L, width, bottleneck), "b1": torch.empty(L, 1, bottleneck),
                "w2": torch.empty(L, bottleneck, out), "b2": torch.empty(L, J, out)}))

    def initialize_weights(self, start: lora.Weights):
        """The only place that sets initial values; start: fresh LoRA weights, A random, B zero."""
        # Step 0 gives start's A plus a part that varies with the instruction, and B = 0 exactly.
        nn.init.normal_(self.site_embedding)
        for mlp, (D_in, _, layers, _) in zip(self.mlps, self.groups):
            nn.init.normal_(mlp["w1"], std=mlp["w1"].shape[1] ** -0.5)
            nn.init.zeros_(mlp["b1"])
            nn.init.normal_(mlp["w2"])
            with torch.no_grad():
                mlp["w2"][..., self.r * D_in:] = 0              # the columns that make B
                for l, names in enumerate(layers):
                    for j, name in enumerate(names):
                        A, B = start[name]
                        mlp["b2"][l, j] = torch.cat([A.flatten() * D_in ** 0.5, B.flatten()])

    def pool_instruction(self, first, last, mask):
        # (K, S, D) twice, (K, S) -> a vector for each task and site, (K, P, W)
        if self.pooling == "mean":
            real = mask[..., None].to(last.dtype)                                   # (K, S, 1)
            mean = ((first + last) * real).sum(1) / real.sum(1)                     # (K, D)
            return self.norm(torch.tanh(self.pool(mean))[:, None] + self.site_embedding)
        memory = self.memory_norm(self.memory(torch.cat([first, last], -1)))        # (K, S, W)
        query = self.site_embedding.expand(len(mask), -1, -1)                       # (K, P, W)
        z = query + self.attention(query, memory, memory, key_padding_mask=~mask,
                                   need_weights=False)[0]
        return self.norm(z + self.ff(self.ff_norm(z)))                              # (K, P, W)

    def forward(self, first, last, mask) -> lora.Weights:
        """States of K instructions -> {site: (lora_A (K, r, D_in), lora_B (K, D_out, r))}."""
        z = self.pool_instruction(first, last, mask)                                # (K, P, W)
        K, weights = len(z), {}
        for mlp, (D_in, D_out, layers, index) in zip(self.mlps, self.groups):
            L, J = index.shape
            x = z[:, index.to(z.device)]                                            # (K, L, J, W)
            x = x.permute(1, 0, 2, 3).reshape(L, K * J, -1)                         # (L, K·J, W)
            hidden = F.relu(x @ mlp["w1"] + mlp["b1"])                              # (L, K·J, G)
            out = (hidden @ mlp["w2"]).view(L, K, J, -1)            # (L, K, J, r·(D_in + D_out))
            # 1/sqrt(G), and 1/sqrt(D_in) for A: one step of Adam then moves the update by the same
            # amount at every size.
            out = out * hidden.shape[-1] ** -0.5 + mlp["b2"][:, None]
            A, B = out.split([self.r * D_in, self.r * D_out], -1)
            A = A.unflatten(-1, (self.r, D_in)) * D_in ** -0.5              # (L, K, J, r, D_in)
            B = B.unflatten(-1, (D_out, self.r))                            # (L, K, J, D_out, r)
            for l, names in enumerate(layers):
                for j, name in enumerate(names):
                    weights[name] = (A[l, :, j], B[l, :, j])
        return {name: weights[name] for name in self.site_shapes}       # in the model's order


class InstructionAttention(nn.Module):
    """Eq. 1, part 1: F_l = S_l + Attention(LayerNorm(S_l), I_x, I_x); its output starts at zero.

    The rest starts as the block's own self-attention (`start_from`), on which the paper is silent:
    the frozen LLM already knows how an input attends to an instruction in front of it.
    """

    def __init__(self, d_model, heads, d_head):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        inner = heads * d_head
        self.q = nn.Linear(d_model, inner, bias=False)
        self.k = nn.Linear(d_model, inner, bias=False)
        self.v = nn.Linear(d_model, inner, bias=False)
        self.o = nn.Linear(inner, d_model, bias=False)
        nn.init.zeros_(self.o.weight)

    @torch.no_grad()
    def start_from(self, layer):
        """Copy query, key, value and norm of a T5 self-attention layer."""
        own = next(module for module in layer.children() if hasattr(module, "q"))
        for name in ("q", "k", "v"):
            getattr(self, name).weight.copy_(getattr(own, name).weight)
        self.q.weight.mul_((len(self.q.weight) / self.heads) ** 0.5)    # T5 does not divide scores
        self.norm.weight.copy_(layer.layer_norm.weight)                 # by sqrt(d_kv)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)        # (·, H, tokens, d_kv)

    def keys_values(self, states):                  # (K, S, D) -> (K, H, S, d_kv) twice, per task
        return self.split(self.k(states)), self.split(self.v(states))

    def forward(self, x, keys, values, mask):
        """(N, T, D), (K, H, S, d_kv) twice, (K, S) -> (N, T, D)."""
        q = self.q(self.norm(x.to(self.norm.weight.dtype)))             # (N, T, H·d_kv)
        q = q.reshape(len(keys), -1, q.shape[-1])                       # (K, N/K·T, H·d_kv)
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        y = F.scaled_dot_product_attention(self.split(q), keys, values, mask[:, None, None])
        y = y.transpose(1, 2).flatten(2)                                # (K, N/K·T, H·d_kv)
        y = self.o(y).view(x.shape)                                     # (N, T, D)
        return x + y.to(x.dtype)


class TAGI(nn.Module):
    """A frozen T5 and what turns instructions into adapters; options: those of train_hyper.py."""

    def __init__(self, llm, tokenizer, options):
        super().__init__()
        self.llm, self.tokenizer, self.options = llm, tokenizer, options
        self.verbatim = options.format == "p3"  # texts are read as they stand
        D, heads = llm.config.d_model, llm.config.num_heads
        torch.manual_seed(options.seed)
        wrappers = lora.inject_lora(llm, options.targets.split(","), options.rank, options.alpha)

        # Eq. 2
        self.generator = None
        if options.generator != "none":
            sites = {name: tuple(w.weight.shape[::-1]) for name, w in wrappers.items()}
            self.generator = Generator(sites, D, options.rank, options.generator, options.width,
                                       options.bottleneck)
            self.generator.initialize_weights(lora.init_weights(llm, options.rank, options.seed))
        # Eq. 1, part 1; part 2 has no weights
        layers = t5.self_attentions(llm) if options.fusion in ("both", "encoder") else []
        self.fusion = nn.ModuleList()
        for l, layer in enumerate(layers):
            self.fusion.append(InstructionAttention(D, heads, llm.config.d_kv))
            self.fusion[l].start_from(layer)
            layer.register_forward_hook(lambda _, x, y, l=l: self._fuse(l, y))

        # The student's own gains and embeddings, which the paper leaves open.
        self.norm_gains, self.embedding_delta = nn.ParameterDict(), None
        if options.train_norms:
            for name, module in list(llm.named_modules()):
                if type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
                    key = name.replace(".", "/")                        # a key may not have a dot
                    self.norm_gains[key] = torch.ones(module.weight.shape)
                    module.register_forward_hook(lambda _, x, y, key=key: self._gain(key, y))
        if options.train_embeddings:
            shared = llm.get_input_embeddings().weight
            self.embedding_delta = nn.Parameter(torch.zeros(shared.shape))
            for module in llm.modules():        # a tied head follows the embeddings, no other does
                if isinstance(module, (nn.Embedding, nn.Linear)) and module.weight is shared:
                    module.register_forward_hook(self._embed)

        llm.requires_grad_(False).eval()
        self.to(next(llm.parameters()).device)
        self.active: Adapter | None = None      # within `adapted`
        self.lock = threading.RLock()           # whoever is within
        self.llm_path = None                    # where `load` found the LLM
        self.merged: Adapter | None = None      # between `merge` and `unmerge`

    # ------------------------------------------- hooks: they do nothing unless an adapter is active

    def _fuse(self, l, output):
        if self.active is None:
            return output
        keys, values = self.active.fusion[l]
        if self.active.scale != 1:
            values = values * self.active.scale
        return self.fusion[l](output[0], keys, values, self.active.mask), *output[1:]

    def _gain(self, key, output):
        return output if self.active is None else (output * self.norm_gains[key]).to(output.dtype)

    def _embed(self, module, args, output):
        if self.active is None:
            return output
        run = F.embedding if isinstance(module, nn.Embedding) else F.linear
        return output + run(args[0], self.embedding_delta.to(output.dtype))

    @contextlib.contextmanager
    def _running(self, adapter, weights):
        """Within: hooks read `adapter`, layers have these LoRA weights; afterwards as before."""
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("another thread is using this model; load one for each, or wait")
        before, weights_before = self.active, lora.weights_of(self.llm)
        try:
            lora.set_weights(self.llm, weights)
            self.active = adapter
            yield
        finally:
            self.active = before
            lora.set_weights(self.llm, weights_before)
            self.lock.release()

    @contextlib.contextmanager
    def adapted(self, adapter: Adapter | None):
        """Within: the LLM with this adapter (None: with none), row k for the k-th of K blocks."""
        if self.merged is not None and adapter is not self.merged:
            raise ValueError("another adapter is merged into the model; call unmerge first")
        weights = None
        if adapter is not None and adapter.weights is not None and self.merged is None:
            weights = adapter.scaled_weights()
            weights = lora.select(weights, 0) if len(adapter) == 1 else weights
            if not torch.is_grad_enabled():     # once, not at every layer and decoding step
                weights = lora.cast(weights, self.llm.dtype)
        with self._running(adapter, weights), self.autocast():
            yield self.llm

    def repetition(self):
        """For `t5.checkpoint_blocks`: the backward pass repeats a block with today's adapter."""
        return contextlib.nullcontext(), self._running(self.active, lora.weights_of(self.llm))

    def merge(self, adapter: Adapter) -> None:
        """Fold one task's LoRA into the LLM: until `unmerge` it runs, alone, at plain T5's cost."""
        if self.merged is not None:
            raise ValueError("already merged; call unmerge first")
        if len(adapter) != 1:
            raise ValueError(f"only one task can be merged, not {len(adapter)}; select one first")
        adapter.check(self)
        with self._running(None, None):         # no other thread may be within
            if adapter.weights is not None:
                lora.merge(self.llm, lora.select(adapter.scaled_weights(), 0))
            self.merged = adapter

    def unmerge(self) -> None:
        with self._running(None, None):
            lora.unmerge(self.llm)
            self.merged = None

    def autocast(self):
        bf16 = self.llm.dtype == torch.bfloat16                 # what is trained stays float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    # ------------------------------------------------------------------------------- the method

    @torch.no_grad()
    def encode_instruction(self, ids, mask):
        """First (embedding) and last states of K instructions in the frozen encoder, (K, S, D)."""
        with self.adapted(None) as llm:
            first = llm.get_input_embeddings()(ids)
            return first, llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]

    def generate_adapter(self, first, last, mask) -> Adapter:
        """Instruction states -> adapter; differentiable, and a pure function of its arguments."""
        mask, weights = mask.bool(), None
        with self.autocast():
            if self.generator is not None:
                weights = self.generator(first, last, mask)
            fusion = [block.keys_values(last) for block in self.fusion]
            return Adapter(weights, last, mask, fusion)

    def encode(self, input_ids, attention_mask):
        """Within `adapted`: the decoder's memory for N instances, (N, S+T, D), and its mask.

        I_x is in front where the decoder is to see it, Eq. 1, part 2; else the memory is (N, T, D).
        """
        N, K = len(input_ids), 1 if self.active is None else len(self.active)
        if N % K:
            raise ValueError(f"{N} inputs cannot be shared out among {K} adapters; use "
                             "adapters.select([...])")
        encoder = self.llm.get_encoder()
        encoded = encoder(input_ids=input_ids, attention_mask=attention_mask)[0]    # (N, T, D)
        if self.active is not None and self.options.fusion in ("both", "decoder"):
            states = self.active.states.repeat_interleave(N // K, 0)                # (N, S, D)
            mask = self.active.mask.repeat_interleave(N // K, 0)                    # (N, S)
            encoded = torch.cat([states.to(encoded.dtype), encoded], 1)             # (N, S+T, D)
            attention_mask = torch.cat([mask.to(attention_mask), attention_mask], 1)
        return BaseModelOutput(last_hidden_state=encoded), attention_mask

    def forward(self, adapter, input_ids, attention_mask, labels):
        """Logits of N instances for their targets, (N, C, V); row k for a block of N / K."""
        with self.adapted(adapter) as llm:
            encoded, mask = self.encode(input_ids, attention_mask)
            decoder_ids = llm.prepare_decoder_input_ids_from_labels(labels)
            return llm(encoder_outputs=encoded, attention_mask=mask, use_cache=False,
                       decoder_input_ids=decoder_ids).logits

    def target_states(self, adapter, input_ids, attention_mask, labels, positions):
        """What the head reads at M of the N·C target positions, (M, D); `head` runs it."""
        with t5.headless(self.llm):
            states = self(adapter, input_ids, attention_mask, labels)               # (N, C, D)
        return states.flatten(0, 1).index_select(0, positions)

    def head(self, adapter, states):                            # (M, D) -> logits (M, V)
        with self.adapted(adapter) as llm:
            return llm.get_output_embeddings()(states)

    # -------------------------------------------------------------------------------- for users

    @torch.no_grad()
    def adapt(self, instructions: list[str], demonstrations=None, scale: float = 1.0) -> Adapter:
        """One adapter for each of K instructions, with a list of (input, output) where given.

        Over the limit of max_instruction tokens an instruction loses demonstrations first and is
        then cut, with a warning. Raises UserError for what is none, and in a saved adapter's model.
        """
        if getattr(self.options, "adapter", False):
            raise UserError("a saved adapter has no hypernetwork; load the checkpoint it is from")
        items, limit = texts.tasks(instructions, demonstrations), self.options.max_instruction
        ids, mask = data.tokenize_instructed(self.tokenizer, items, limit, self.device,
                                             self.verbatim)                         # (K, S)
        adapter = self.generate_adapter(*self.encode_instruction(ids, mask), mask)
        adapter.scale, adapter.model = texts.scale(scale), self
        adapter.tasks = texts.told(items)
        return adapter

    @torch.no_grad()
    def generate(self, inputs: list[str], adapters: Adapter | None, batch_size: int = 128,
                 num_beams: int = 1, max_new_tokens: int = 128, **options) -> list[str]:
        """Answers to the inputs. adapters: one row for all, or row n for input n; None: no adapter.

        options go to Transformers' `generate`. Raises UserError for an empty input or another
        model's adapter, and where its rows are neither one nor as many as the inputs.
        """
        inputs, outputs = texts.inputs(inputs), []
        texts.counts(batch_size=batch_size, num_beams=num_beams, max_new_tokens=max_new_tokens)
        for _, ids, mask, adapter in self._batches(inputs, adapters, batch_size):
            with self.adapted(adapter) as llm:              # an input's beams are a block of rows
                encoded, mask = self.encode(ids, mask)
                out = llm.generate(encoder_outputs=encoded, attention_mask=mask,
                                   num_beams=num_beams, max_new_tokens=max_new_tokens,
                                   **{"do_sample": False, **options})
            outputs += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return outputs

    @torch.no_grad()
    def score_choices(self, inputs: list[str], choices: list[list[str]], adapters: Adapter | None,
                      batch_size: int = 128, normalize: bool = False,
                      max_new_tokens: int = 128) -> list[list[float]]:
        """Each input's answer choices' log-likelihoods (`t5.score_choices`), or those per token."""
        inputs, scores = texts.inputs(inputs), []
        choices = texts.choices(choices, len(inputs))
        texts.counts(batch_size=batch_size, max_new_tokens=max_new_tokens)
        for rows, ids, mask, adapter in self._batches(inputs, adapters, batch_size):
            labels, owner = data.choice_labels(self.tokenizer, choices[rows], max_new_tokens,
                                               self.device)                 # (M, C), (M,)
            with self.adapted(adapter):
                encoded, mask = self.encode(ids, mask)      # the encoder runs once an input
            if adapter is not None and len(adapter) > 1:
                adapter = adapter.select(owner)
            with self.adapted(adapter) as llm:
                scores += t5.score_choices(llm, encoded[0], mask, labels, owner, normalize)
        return scores

    def _batches(self, inputs, adapters, batch_size):
        # (slice of the inputs, ids, mask, the adapter's rows) for one batch after another
        texts.check_rows(adapters, self, len(inputs))
        one_for_all = adapters is None or len(adapters) == 1
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, min(start + batch_size, len(inputs)))
            read = [data.instance_text(text, self.verbatim) for text in inputs[rows]]
            ids, mask = data.tokenize(self.tokenizer, read, self.options.max_input, self.device)
            its = adapters if one_for_all else adapters.select(range(rows.start, rows.stop))
            yield rows, ids, mask, its

    @property
    def device(self):
        return next(self.llm.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything except the LLM, by name: what is trained and what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("llm.")}

    def __repr__(self):                         # in one line, where nn.Module tells all layers
        o, llm = self.options, type(self.llm).__name__
        return f"TAGI({llm}, generator {o.generator}, fusion {o.fusion}, rank {o.rank})"

    @classmethod
    def load(cls, folder: str, device: str | None = None, precision: str = "fp32",
             llm: str | None = None) -> "TAGI":
        """A trained model from a checkpoint folder, with the frozen LLM that config.yaml names.

        device: by default the GPU where there is one; llm: where the LLM is now, if not there.
        Raises UserError where a file is missing or is of another model, rank or set of layers.
        """
        folder = t5.checkpoint_at(folder)
        options = recorded.load_options(folder, recorded.OF_A_STUDENT)
        device = config.device_of(device)
        path = t5.llm_of(folder, options, llm)
        llm, tokenizer = t5.load_llm(path, device, precision, options.attention)
        t5.check_trained_on(llm, tokenizer, options, folder, path)
        tagi = cls(llm, tokenizer, options)
        tagi.llm_path = path
        trained = common.load_weights(tagi.trainable(), folder)
        its = trained.get("targets", options.targets)       # q,v and q,k may be of the same shapes
        if its != options.targets:
            raise UserError(f"{folder} was trained with targets {its}, not {options.targets}")
        return tagi
