"""The hypernetwork: from an instruction to an adapter (LoRA weights and fusion states) for a frozen T5.

    instruction a ──► frozen encoder ──► I_x ──► pooling per site ──► MLP_l ──► lora_A, lora_B      (Eq. 2)
                                          ├────► cross-attention in every encoder block             (Eq. 1, part 1)
                                          └────► decoder attends over (I_x ; encoder output)        (Eq. 1, part 2)

Generation is a pure function of the instruction's hidden states. Its output starts at zero, so step 0 is the frozen LLM.
What the student trains is its own: the LLM's weights are never written, only multiplied by gains or added to in hooks
that are active between `adapted()`'s braces. Outside them the same object is the frozen LLM, the teacher's base.

    K  instructions (tasks)   S  instruction tokens   P  adapted sites (layer, projection)   r  LoRA rank
    N  instances              T  input tokens         L  layers in a group of sites          H  attention heads
    D  d_model                C  target tokens        w  generator width                     h  generator bottleneck
"""
import contextlib
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

import common
import data
import lora
import t5
from rank import log_likelihoods, owner_of


@dataclass
class Adapter:
    """What an instruction becomes, for K tasks: made once, used for every instance and every decoding step."""
    weights: lora.Weights | None                             # {site: (K, r, D_in), (K, D_out, r)}; None: no hypernetwork
    states: torch.Tensor                                     # (K, S, D) I_x, the encoded instruction
    mask: torch.Tensor                                       # (K, S) bool, False on padding
    fusion: list[tuple[torch.Tensor, torch.Tensor]]          # per encoder block keys, values (K, H, S, d_kv); [] if off

    def __len__(self):
        return len(self.mask)

    def select(self, index) -> "Adapter":
        """One row per instance of a mixed batch: row index[n] for instance n. index: list or tensor of N integers."""
        index = torch.as_tensor(index, device=self.mask.device)
        return Adapter(self.weights and lora.select(self.weights, index), self.states[index], self.mask[index],
                       [(k[index], v[index]) for k, v in self.fusion])


class Generator(nn.Module):
    """Eq. 2: LoRA_l = MLP_l(I_x, idx), two linears with a ReLU between, one MLP per layer shared by its projections.

    sites: {name: (D_in, D_out)}, the names as `lora.inject_lora` returns them. How I_x (S × D) becomes a vector is not in
    the paper. pooling="attention": a learned query per site attends over the tokens; it stands for idx as well.
    pooling="mean": the released code's tanh(Linear(mean of first + last states)) plus a learned embedding of idx, with
    the mean over real tokens only.
    """

    def __init__(self, sites, d_model, r, pooling="attention", width=128, bottleneck=128, heads=4):
        super().__init__()
        self.r, self.pooling, self.heads = r, pooling, heads
        self.site_shapes = dict(sites)
        self.site_embedding = nn.Parameter(torch.empty(len(sites), width))                  # idx, or the query
        if pooling == "attention":
            if width % heads:
                raise common.UserError(f"--width {width} is not a multiple of the generator's {heads} attention heads")
            self.memory = nn.Linear(2 * d_model, width)
            self.memory_norm = nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.ff_norm = nn.LayerNorm(width)
            self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        else:
            self.pool = nn.Linear(d_model, width)
        self.norm = nn.LayerNorm(width)

        # Layers whose projections look alike form a group, and a group's MLPs run as one batched matmul.
        layers: dict[tuple, list[str]] = {}
        for name, shape in sites.items():
            layers.setdefault((name.rpartition(".")[0], shape), []).append(name)
        groups: dict[tuple, list[list[str]]] = {}
        for (_, shape), names in layers.items():
            groups.setdefault((shape, tuple(n.rpartition(".")[2] for n in names)), []).append(names)
        position = {name: p for p, name in enumerate(sites)}
        self.groups, self.mlps = [], nn.ModuleList()
        for ((D_in, D_out), kinds), names in groups.items():
            self.groups.append((D_in, D_out, names, torch.tensor([[position[n] for n in row] for row in names])))
            L, p, out = len(names), len(kinds), r * (D_in + D_out)
            mlp = nn.ParameterDict({"w1": torch.empty(L, width, bottleneck), "b1": torch.empty(L, 1, bottleneck),
                                    "w2": torch.empty(L, bottleneck, out), "b2": torch.empty(L, p, out)})
            self.mlps.append(mlp)

    def initialize_weights(self, start: lora.Weights):
        """The only place that sets initial values. `start`: fresh LoRA weights (`lora.init_weights`), A random, B zero.

        Step 0 gives A = start's A plus a part that varies with the instruction, and B = 0 exactly.
        """
        nn.init.normal_(self.site_embedding)
        for mlp, (D_in, _, names, _) in zip(self.mlps, self.groups):
            nn.init.normal_(mlp["w1"], std=mlp["w1"].shape[1] ** -0.5)
            nn.init.zeros_(mlp["b1"])
            nn.init.normal_(mlp["w2"])
            with torch.no_grad():
                mlp["w2"][..., self.r * D_in:] = 0                                          # B's columns
                for l, row in enumerate(names):
                    for p, name in enumerate(row):
                        A, B = start[name]
                        mlp["b2"][l, p] = torch.cat([A.flatten() * D_in ** 0.5, B.flatten()])

    def pool_instruction(self, first, last, mask):
        """(K, S, D), (K, S, D), (K, S) -> one vector per task and site, (K, P, w)."""
        K = len(mask)
        if self.pooling == "mean":
            m = mask[..., None].to(last.dtype)                                              # (K, S, 1)
            mean = ((first + last) * m).sum(1) / m.sum(1)                                   # (K, D)
            return self.norm(torch.tanh(self.pool(mean))[:, None] + self.site_embedding)    # (K, P, w)
        memory = self.memory_norm(self.memory(torch.cat([first, last], -1)))                # (K, S, w)
        query = self.site_embedding.expand(K, -1, -1)                                       # (K, P, w)
        z = query + self.attention(query, memory, memory, key_padding_mask=~mask, need_weights=False)[0]
        z = z + self.ff(self.ff_norm(z))
        return self.norm(z)                                                                 # (K, P, w)

    def forward(self, first, last, mask) -> lora.Weights:
        """Encoder states of K instructions -> LoRA weights {site: (lora_A (K, r, D_in), lora_B (K, D_out, r))}."""
        z = self.pool_instruction(first, last, mask)
        K, weights = len(z), {}
        for mlp, (D_in, D_out, names, index) in zip(self.mlps, self.groups):
            L, p = index.shape
            h = z[:, index.to(z.device)].permute(1, 0, 2, 3).reshape(L, K * p, -1)          # (L, K·p, w)
            h = F.relu(h @ mlp["w1"] + mlp["b1"])                                           # (L, K·p, h)
            # 1/sqrt(h) and 1/sqrt(D_in) make one step of Adam move the update by the same amount at every size.
            out = (h @ mlp["w2"]).view(L, K, p, -1) * h.shape[-1] ** -0.5 + mlp["b2"][:, None]
            A, B = out.split([self.r * D_in, self.r * D_out], -1)
            A = A.unflatten(-1, (self.r, D_in)) * D_in ** -0.5                              # (L, K, p, r, D_in)
            B = B.unflatten(-1, (D_out, self.r))                                            # (L, K, p, D_out, r)
            for l, row in enumerate(names):
                for i, name in enumerate(row):
                    weights[name] = (A[l, :, i], B[l, :, i])
        return {name: weights[name] for name in self.site_shapes}


class InstructionAttention(nn.Module):
    """Eq. 1, part 1: F_l = S_l + Attention(LayerNorm(S_l), I_x, I_x); the output projection starts at zero.

    The rest starts as the block's own self-attention (`start_from`), on which the paper is silent: the frozen LLM
    already knows how an input attends to an instruction in front of it.
    """

    def __init__(self, d_model, heads, d_head):
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(d_model, heads * d_head, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * d_head, d_model, bias=False)
        nn.init.zeros_(self.o.weight)

    @torch.no_grad()
    def start_from(self, layer):
        """Copy query, key, value and norm of a T5 self-attention layer, whose scores are not divided by sqrt(d_kv)."""
        own = next(module for module in layer.children() if hasattr(module, "q"))
        for name in ("q", "k", "v"):
            getattr(self, name).weight.copy_(getattr(own, name).weight)
        self.q.weight.mul_((len(self.q.weight) / self.heads) ** 0.5)
        self.norm.weight.copy_(layer.layer_norm.weight)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                            # (N, H, ·, d_kv)

    def keys_values(self, states):                                                          # (K, S, D), once per task
        return self.split(self.k(states)), self.split(self.v(states))

    def forward(self, x, k, v, mask):                                                       # (N, T, D), ..., (K, S)
        q = self.q(self.norm(x.to(self.norm.weight.dtype))).reshape(len(k), -1, k.shape[1] * k.shape[-1])
        y = F.scaled_dot_product_attention(self.split(q), k, v, attn_mask=mask[:, None, None])      # (K, H, N/K·T, d_kv)
        return x + self.o(y.transpose(1, 2).flatten(2)).view(x.shape).to(x.dtype)


class TAGI(nn.Module):
    """A frozen T5 and what turns instructions into adapters for it.

    options: `common`'s student options, also written to a checkpoint's config.yaml: rank, alpha, targets, hypernetwork,
    generator, width, bottleneck, encoder_fusion, decoder_fusion, train_norms, train_embeddings, seed, max_instruction,
    max_input, format.
    """

    def __init__(self, llm, tokenizer, options):
        super().__init__()
        self.llm, self.tokenizer, self.options = llm, tokenizer, options
        D, heads = llm.config.d_model, llm.config.num_heads
        torch.manual_seed(options.seed)
        sites = lora.inject_lora(llm, options.targets.split(","), options.rank, options.alpha)
        self.generator = None
        if options.hypernetwork:
            shapes = {name: tuple(w.weight.shape[::-1]) for name, w in sites.items()}       # (D_in, D_out)
            self.generator = Generator(shapes, D, options.rank, options.generator, options.width, options.bottleneck)
            self.generator.initialize_weights(lora.init_weights(llm, options.rank, options.seed))
        stack = t5.self_attentions(llm) if options.encoder_fusion else []
        self.fusion = nn.ModuleList(InstructionAttention(D, heads, llm.config.d_kv) for _ in stack)
        for l, layer in enumerate(stack):
            self.fusion[l].start_from(layer)
            layer.register_forward_hook(lambda _, args, out, l=l: self._fuse(l, out))

        self.norm_gains, self.embedding_delta = nn.ParameterDict(), None
        if options.train_norms:
            for name, module in list(llm.named_modules()):
                if type(module).__name__.endswith(("LayerNorm", "RMSNorm")):
                    key = name.replace(".", "/")                                            # a dot may not be in a key
                    self.norm_gains[key] = torch.ones(module.weight.shape)
                    module.register_forward_hook(lambda _, args, out, key=key: self._gain(key, out))
        if options.train_embeddings:
            shared = llm.get_input_embeddings().weight
            self.embedding_delta = nn.Parameter(torch.zeros(shared.shape))
            for module in llm.modules():                          # a tied head follows the embedding, an untied one stays
                if isinstance(module, (nn.Embedding, nn.Linear)) and module.weight is shared:
                    module.register_forward_hook(self._embed)
        llm.requires_grad_(False).eval()
        self.to(next(llm.parameters()).device)
        self.active: Adapter | None = None
        self.merged: Adapter | None = None

    # ---------------------------------------------------------- hooks: nothing unless an adapter is active

    def _fuse(self, l, output):
        if self.active is None:
            return output
        k, v = self.active.fusion[l]
        return (self.fusion[l](output[0], k, v, self.active.mask), *output[1:])

    def _gain(self, key, output):
        return output if self.active is None else output * self.norm_gains[key].to(output.dtype)

    def _embed(self, module, args, output):
        if self.active is None:
            return output
        f = F.embedding if isinstance(module, nn.Embedding) else F.linear
        return output + f(args[0], self.embedding_delta.to(output.dtype))

    @contextlib.contextmanager
    def adapted(self, adapter: Adapter | None):
        """Within: the LLM runs with this adapter, row k for the k-th of K equal blocks of instances. None: the frozen LLM."""
        if self.merged is not None and adapter is not self.merged:
            raise ValueError("another adapter is merged into the model; call unmerge first")
        weights = adapter.weights if adapter is not None and self.merged is None else None
        if weights is not None:
            weights = lora.select(weights, 0) if len(adapter) == 1 else weights
            if not torch.is_grad_enabled():                                 # once, not at every layer and decoding step
                weights = lora.cast(weights, self.llm.dtype)
        if self.merged is None:
            lora.set_weights(self.llm, weights)
        self.active = adapter
        try:
            with self.autocast():
                yield self.llm
        finally:
            self.active = None
            if self.merged is None:
                lora.set_weights(self.llm, None)

    def repetition(self):
        """For `lora.checkpoint_blocks`: the backward pass repeats a block with the adapter that is active now."""
        adapter, weights = self.active, lora.weights_of(self.llm)

        @contextlib.contextmanager
        def again():
            before = self.active, lora.weights_of(self.llm)
            self.active = adapter
            lora.set_weights(self.llm, weights)
            try:
                yield
            finally:
                self.active = before[0]
                lora.set_weights(self.llm, before[1])
        return contextlib.nullcontext(), again()

    def merge(self, adapter: Adapter) -> None:
        """Fold one task's LoRA into the LLM. Until `unmerge`, only this adapter can run, at plain T5's cost."""
        if self.merged is not None:
            raise ValueError("already merged; call unmerge first")
        if len(adapter) != 1:
            raise ValueError(f"only one task can be merged, not {len(adapter)}; select one first")
        if adapter.weights is not None:
            lora.merge(self.llm, lora.select(adapter.weights, 0))
        self.merged = adapter

    def unmerge(self) -> None:
        lora.unmerge(self.llm)
        self.merged = None

    # ---------------------------------------------------------- the method

    @torch.no_grad()
    def encode_instruction(self, ids, mask):
        """The frozen LLM's own encoder on K instructions: first (embedding) and last hidden states, (K, S, D) each."""
        with self.adapted(None) as llm:
            return llm.get_input_embeddings()(ids), llm.get_encoder()(input_ids=ids, attention_mask=mask)[0]

    def generate_adapter(self, first, last, mask) -> Adapter:
        """Instruction states -> adapter; differentiable, and a pure function of its arguments."""
        mask = mask.bool()
        with self.autocast():
            weights = self.generator(first, last, mask) if self.generator is not None else None
            return Adapter(weights, last, mask, [block.keys_values(last) for block in self.fusion])

    def autocast(self):
        """bf16 arithmetic where the LLM is held in bf16; what is trained stays float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.llm.dtype == torch.bfloat16)

    def encode(self, input_ids, attention_mask):
        """Within `adapted`: encoder output of the instances, with I_x in front where the decoder is to see it."""
        N = len(input_ids)
        if self.active is not None and N % len(self.active):
            raise ValueError(f"{N} inputs cannot be shared out among {len(self.active)} adapters; use adapters.select([...])")
        encoded = self.llm.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]          # (N, T, D)
        if self.active is not None and self.options.decoder_fusion:
            states, its_mask = (x.repeat_interleave(N // len(x), 0) for x in (self.active.states, self.active.mask))
            encoded = torch.cat([states.to(encoded.dtype), encoded], 1)                                  # (N, S+T, D)
            attention_mask = torch.cat([its_mask.to(attention_mask), attention_mask], 1)
        return BaseModelOutput(last_hidden_state=encoded), attention_mask

    def forward(self, adapter, input_ids, attention_mask, labels):
        """Logits of N instances for their targets, (N, C, V). adapter: K rows, row k for the k-th block of N / K instances."""
        with self.adapted(adapter):
            encoded, mask = self.encode(input_ids, attention_mask)
            return self.llm(encoder_outputs=encoded, attention_mask=mask, use_cache=False,
                            decoder_input_ids=self.llm.prepare_decoder_input_ids_from_labels(labels)).logits

    def target_states(self, adapter, input_ids, attention_mask, labels, positions):
        """What the head reads at M of the N·C target positions, (M, D); `head` makes `forward`'s logits of it."""
        with lora.headless(self.llm):
            return self(adapter, input_ids, attention_mask, labels).flatten(0, 1).index_select(0, positions)

    def head(self, adapter, states):
        """(M, D) -> (M, V)."""
        with self.adapted(adapter) as llm:
            return llm.get_output_embeddings()(states)

    # ---------------------------------------------------------- for users

    @torch.no_grad()
    def adapt(self, instructions: list[str], demonstrations: list[list[tuple[str, str]]] | None = None) -> Adapter:
        """One adapter for each of K instructions, with (input, output) demonstrations where given; "" is no instruction.

        An instruction over the limit of max_instruction tokens loses demonstrations first and is then cut, with a warning.
        """
        items = list(zip(map(self.in_format, instructions), demonstrations or [[]] * len(instructions), strict=True))
        ids, mask = data.tokenize_instructed(self.tokenizer, items, self.options.max_instruction, self.device)
        return self.generate_adapter(*self.encode_instruction(ids, mask), mask)

    @torch.no_grad()
    def generate(self, inputs: list[str], adapters: Adapter | None, batch_size: int = 128, num_beams: int = 1,
                 max_new_tokens: int = 128, **options) -> list[str]:
        """Answers to the inputs. adapters: one row for all, or row n for input n; None: the frozen LLM alone.

        options go to Transformers' `generate` (sampling, length limits). Raises UserError for an empty input and
        ValueError where the rows are neither one nor as many as the inputs.
        """
        outputs = []
        for _, ids, mask, adapter in self._batches(inputs, adapters, batch_size):
            with self.adapted(adapter) as llm:                              # beams of an input are a block
                encoded, mask = self.encode(ids, mask)
                out = llm.generate(encoder_outputs=encoded, attention_mask=mask, num_beams=num_beams,
                                   max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
            outputs += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return outputs

    @torch.no_grad()
    def rank(self, inputs: list[str], choices: list[list[str]], adapters: Adapter | None, batch_size: int = 128,
             normalize: bool = False, max_new_tokens: int = 128) -> list[list[float]]:
        """Log-likelihoods of every input's answer choices (`rank.log_likelihoods`); the encoder runs once an input.

        adapters, and what is raised, as in `generate`.
        """
        scores = []
        for rows, ids, mask, adapter in self._batches(inputs, adapters, batch_size):
            with self.adapted(adapter):
                encoded, mask = self.encode(ids, mask)
            owner = owner_of(choices[rows])                                             # choice -> input
            with self.adapted(adapter if adapter is None or len(adapter) == 1 else adapter.select(owner)) as llm:
                scores += log_likelihoods(llm, self.tokenizer, encoded[0], mask, choices[rows], normalize, max_new_tokens)
        return scores

    def _batches(self, inputs, adapters, batch_size):
        """(slice of the inputs, ids, mask, the adapter's rows) for one batch after another."""
        if adapters is not None and len(adapters) not in (1, len(inputs)):
            raise ValueError(f"{len(adapters)} adapters for {len(inputs)} inputs; use adapters.select([...])")
        for n, text in enumerate(inputs):
            if not text.strip():
                raise common.UserError(f"input {n + 1} is empty; give every instance some text")
        texts = [data.instance_text(self.in_format(text)) for text in inputs]
        for i in range(0, len(texts), batch_size):
            ids, mask = data.tokenize(self.tokenizer, texts[i:i + batch_size], self.options.max_input, self.device)
            rows = slice(i, i + len(ids))
            one_for_all = adapters is None or len(adapters) == 1
            yield rows, ids, mask, adapters if one_for_all else adapters.select(range(rows.start, rows.stop))

    def in_format(self, text: str) -> str:
        """A text as the format that this student was trained in has it: P3's are read as they stand."""
        return data.Verbatim(text) if self.options.format == "p3" else text

    @property
    def device(self):
        return next(self.llm.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything but the LLM, by name: what is trained and what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("llm.")}

    @classmethod
    def load(cls, folder: str, device: str = "cpu", precision: str = "fp32") -> "TAGI":
        """A trained model from a checkpoint folder, ready for `adapt` and `generate`.

        The frozen LLM is found by the name or (relative) path in config.yaml. Raises UserError where a file is missing
        or the weights are of another model, rank or set of layers.
        """
        options = common.load_options(folder, needs="llm_path")
        path = common.llm_of(folder, options)
        llm, tokenizer = t5.load_llm(path, device, precision, options.attention)
        common.check_fingerprint(t5.fingerprint(llm), options.llm_fingerprint, folder, path)
        tagi = cls(llm, tokenizer, options)
        trained = common.load_weights(tagi.trainable(), folder)
        if trained.get("targets", options.targets) != options.targets:      # q,v and q,k may be of the same shapes
            raise common.UserError(f"{folder} was trained with targets {trained['targets']}, not {options.targets}")
        return tagi
