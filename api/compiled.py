"""`CompiledModel`: what `moec.compile` and `moec.load` return."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moec.frontend import Signature
from moec.generation import UNSET, Generator, no_generation
from moec.ir import ArgumentTypeError, ArgumentValueError, CompileError, Graph
from moec.ir.interpreter import MOST_KEYS, bind_inputs, call_key
from moec.program import Program, Settings
from moec.report import Report
from moec.sampling import Sampling
from moec.speculation import Speculation, Speculator


class CompiledModel:
    """A model that runs on a backend. Calls may come from several threads.

    `program` is None for a language model that was compiled without example arguments: it only generates.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        program: Program | None,
        signature: Signature | None,
        *,
        generator: Generator | None = None,
        make_generator: Callable[[], Generator] | None = None,
        speculator: Speculator | None = None,
        make_speculator: Callable[[], Speculator] | None = None,
        seconds: dict[str, float] | None = None,
        tokenizer: bytes | None = None,
    ):
        self.name = name
        self.settings = settings
        self._program = program
        self._signature = signature
        self._generator = generator
        self._make_generator = make_generator
        self._speculator = speculator
        self._make_speculator = make_speculator
        self._lock = threading.Lock()
        self._accepted: set[Any] = set()  # kinds of calls that were found to be right
        self._seconds = seconds or {}
        self.tokenizer_json = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: the arguments it was compiled with, in the same structure (dynamic sizes may differ);
        returns the model's own result structure.

        Raises ArgumentTypeError (a TypeError) for a wrong count, kind or dtype and ArgumentValueError (a
        ValueError) for a wrong rank, size or constant, naming the argument, expected and got.
        """
        if self._program is None or self._signature is None:
            raise CompileError(
                f"{self.name} was compiled without example arguments, so there is only generate()",
                code="arguments",
                hint="moec.compile(model, args=(example, …)) makes it callable",
            )
        inputs = self._signature.flatten(args, kwargs)
        key = call_key(inputs)
        if key not in self._accepted:
            self._signature.check_bounds(bind_inputs(self._program.graph, inputs))
            if len(self._accepted) >= MOST_KEYS:
                self._accepted.clear()
            self._accepted.add(key)
        with torch.no_grad():
            return self._signature.unflatten(self._program.executable.run(inputs))

    @property
    def program(self) -> Program:
        """The plain program, or the cached one of a model compiled without example arguments."""
        return self._program if self._program is not None else self.generator.program

    @property
    def signature(self) -> Signature | None:
        """The call structure; None for a model compiled without example arguments."""
        return self._signature

    @property
    def graph(self) -> Graph:
        """The IR after the target-independent passes."""
        return self.program.graph

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self.settings.backend.name

    @property
    def report(self) -> Report:
        """What compilation did, so far: the cached program appears once it exists."""
        programs = {}
        if self._program is not None:
            programs["forward"] = self._program
        if self._generator is not None:
            programs |= self._generator.programs
        if self._speculator is not None:
            programs["speculative"] = self._speculator.program
        return Report(self.name, self.backend, programs, dict(self._seconds))

    @property
    def can_generate(self) -> bool:
        """Whether the model has a KV cache protocol."""
        return self._generator is not None or self._make_generator is not None

    @property
    def can_speculate(self) -> bool:
        """Whether the model has a head that drafts tokens."""
        return self._speculator is not None or self._make_speculator is not None

    @property
    def generator(self) -> Generator:
        """The cached program, compiled when first asked for. Raises CompileError where the model has no cache."""
        with self._lock:
            if self._generator is None:
                if self._make_generator is None:
                    raise no_generation(f"{self.name} keeps no KV cache")
                self._generator = self._make_generator()
            return self._generator

    @property
    def speculator(self) -> Speculator:
        """The program that drafts tokens, compiled when first asked for. Raises CompileError where the model has no
        head that does."""
        with self._lock:
            if self._speculator is None:
                if self._make_speculator is None:
                    raise CompileError(
                        f"{self.name} cannot decode speculatively: it has no multi-token prediction head",
                        code="generate",
                        hint="models of moec.models with num_mtp_layers ≥ 1 have one",
                    )
                self._speculator = self._make_speculator()
            return self._speculator

    @property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that came with the checkpoint: `.encode(text).ids`, `.decode(ids)`. Raises
        CompileError where there was none, or it is damaged."""
        if self.tokenizer_json is None:
            raise CompileError(
                f"{self.name} came without a tokenizer.json",
                code="tokenizer",
                hint="put the model's tokenizer.json beside its weights, or pass token ids to generate()",
            )
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise CompileError(
                "reading tokenizer.json needs the package tokenizers", code="tokenizer", hint="pip install tokenizers"
            ) from None
        try:
            return Tokenizer.from_str(self.tokenizer_json.decode("utf-8"))
        except Exception as e:  # the library's errors have no common base but this
            raise CompileError(f"the tokenizer.json of {self.name} is damaged: {e}", code="tokenizer") from None

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 32,
        eos_token_id: Any = UNSET,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_token: Callable[[torch.Tensor], Any] | None = None,
        speculative: bool | Speculation = False,
    ) -> torch.Tensor:
        """Continue prompts. input_ids i64[B, S]; attention_mask i64[B, S], 0 for padding on the left, None for none.

        Returns the prompt and up to `max_new_tokens` new ids, i64[B, S + n]. A row ends with an end-of-sequence
        token (`eos_token_id`: an id, a list of ids, None to never stop; by default the model's own) and is filled
        with the model's pad token, else the first end-of-sequence id; n is smaller where all rows ended. The cached
        program is traced and compiled at the first call.

        Greedy unless one of these is given: `temperature` (0: greedy), `top_k`, `top_p` (see
        `moec.sampling.Sampling`), `seed` (the same batch gives the same tokens again). `on_token` is called with the
        new tokens i64[B] after each step; what it raises ends the generation. `speculative`: greedy decoding with the
        drafts of the model's multi-token prediction head, which gives the same tokens in fewer steps; a
        `moec.speculation.Speculation` counts them.

        Raises ArgumentTypeError/ArgumentValueError for arguments that do not fit, ids beyond the vocabulary and more
        positions than the model's config has among them, CompileError for a model without a cache.
        """
        sampling = Sampling.of(temperature, top_k, top_p, seed)
        if not isinstance(speculative, bool | Speculation):
            raise ArgumentTypeError(
                f"argument 'speculative' must be a bool or a Speculation, got {type(speculative).__name__}",
                code="arguments",
            )
        if speculative is not False:
            if not sampling.greedy:
                raise ArgumentValueError("speculative decoding is greedy, it does not sample", code="value")
            counts = speculative if isinstance(speculative, Speculation) else None
            with torch.no_grad():
                return self.speculator.speculate(
                    input_ids, attention_mask, max_new_tokens, eos_token_id, on_token, counts
                )
        with torch.no_grad():
            return self.generator.generate(input_ids, attention_mask, max_new_tokens, eos_token_id, sampling, on_token)

    def save(self, folder: str | Path) -> None:
        """Write text IR, safetensors weights, a manifest and the backend's files to `folder`, whole or not at all.

        A language model's programs for `generate` are compiled for it and saved along. An existing folder is replaced
        if it is empty or was written by `save`. Raises ArtifactError otherwise, CompileError for what cannot be saved.
        """
        from moec.saving import save

        save(self, Path(folder))

    def __repr__(self) -> str:
        return f"<CompiledModel {self.name} on {self.backend}>"
