"""The methods that both models share.

A model is data and a lease of engines. The state of a lease is in `vllm_tasks.engines.sharing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from operator import is_
from typing import Any, Self

from pydantic import PrivateAttr, ValidationError

from vllm_tasks import tables
from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.arguments import check_spelling
from vllm_tasks.calls.call import Call, OnError, Output
from vllm_tasks.calls.chat import of_call
from vllm_tasks.calls.classes import check_sampling
from vllm_tasks.calls.media import NO_MEDIA, Media
from vllm_tasks.calls.prompt_func import keywords_of, named_parameters
from vllm_tasks.calls.prompts import Context, Prompter, load_artifact
from vllm_tasks.calls.row_parameters import OUTPUT_FORMATS
from vllm_tasks.calls.sampling import Target, check_names
from vllm_tasks.calls.sampling_values import check_values
from vllm_tasks.calls.schemas import response_format
from vllm_tasks.calls.signature import signed_as
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.models.checks import ModelFields
from vllm_tasks.rows import Completion, RowError
from vllm_tasks.validation import run
from vllm_tasks.validation.report import ValidationReport


class Checked:
    """The values of a model's fields when they were last checked: a field may be assigned, also in a copy."""

    values: Sequence[Any] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checked)  # models are equal by their fields

    def __reduce__(self) -> tuple[type[Checked], tuple[()]]:
        return Checked, ()


class Predictor(ModelFields):
    """The methods that both models share."""

    _lease: sharing.Lease = PrivateAttr(default_factory=sharing.Lease)
    _checked: Checked = PrivateAttr(default_factory=Checked)

    def predict(self, x: Any, context: Context = None, **sampling: Any) -> Output:
        """Predict the answer to one record.

        Args:
            x: The record, of the form that `signature` names.
            context: Fills `{context}` in the prompt.
            **sampling: Sampling parameters, which override `predict_kwargs`; arguments of the `prompt_func`.

        Returns:
            A text, or the value that `datatype` or `output_schema` make of it; with `n > 1` a list of these.
            An `output_schema` gives plain JSON data, also if it is a pydantic model.

        Raises:
            RowErrors: The row failed.
            InvalidCall: The call cannot succeed as it is.
            ServerUnavailable: No server could be reached within the grace period.
            EngineFailed: The engine did not start, or died and could not be restarted.
        """
        call = self.prepare(self.predict, context, sampling)  # first: it checks fields that were assigned
        if self.prompt_func is None and self.signature == "singleton" and not self.media():
            _refuse_many(x)
        return call.predict(x)

    def predict_batches(
        self, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
    ) -> list[Output | RowError]:
        """Predict the answers to N records. A row that fails does not stop the others.

        Args:
            xs: The records, each as `predict` takes it.
            context: Fills `{context}` in every prompt.
            on_error: "raise" raises `RowErrors` at the end if rows failed; "return" puts a `RowError` at the
                position of each failed row.
            **sampling: As for `predict`.

        Returns:
            N answers in input order, each as `predict` returns it.

        Raises:
            RowErrors: Rows failed; it has all results.
            InvalidCall: The call cannot succeed as it is.
            ServerUnavailable: No server could be reached within the grace period.
            EngineFailed: The engine did not start, or died and could not be restarted.
        """
        return self.prepare(self.predict_batches, context, sampling).predict_batches(xs, on_error)

    def completions(
        self, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
    ) -> list[Completion | RowError]:
        """Predict N records and return full results: texts, token ids, logprobs, finish reasons, usage.

        Args:
            xs: The records, each as `predict` takes it.
            context: Fills `{context}` in every prompt.
            on_error: As for `predict_batches`.
            **sampling: As for `predict`.

        Returns:
            N completions in input order, as vLLM gave them: neither decoded nor checked against a schema.

        Raises:
            RowErrors: Rows failed; it has all results.
            InvalidCall: The call cannot succeed as it is.
            ServerUnavailable: No server could be reached within the grace period.
            EngineFailed: The engine did not start, or died and could not be restarted.
        """
        return self.prepare(self.completions, context, sampling).completions(xs, on_error)

    def prepare(
        self, call: Callable[..., Any], context: Context = None, sampling: Mapping[str, Any] | None = None
    ) -> Call:
        """Combine the model's fields with the arguments of one call.

        Args:
            call: The function that is called; errors suggest its arguments for misspelt names.
            context: Fills `{context}` in every prompt.
            sampling: The call's further arguments: sampling parameters and arguments of the `prompt_func`.

        Returns:
            The call, ready to process records.

        Raises:
            InvalidCall: An argument or a field is wrong, or they do not fit together.
        """
        self._check_assigned()
        target, known = self.sampling_target(), self.sampling_names()
        keywords = keywords_of(self.prompt_func, self.signature, sampling or {}, known)
        given = {name: value for name, value in (sampling or {}).items() if name not in keywords}
        check_spelling(given, call, known, more=named_parameters(self.prompt_func))
        decoder = self._decoder(given)
        parameters = self._sampling(given, decoder)
        version = cache(self._server_version)  # rows are checked too
        check = partial(check_names, target=target, python=self.vllm_python(), server_version=version)
        check(parameters)
        check_values(parameters)
        return Call(
            identifier=self.identifier,
            uuid=self.uuid,
            engine=self.engine_config(),
            max_batch_size=self.max_batch_size,
            target=target,
            decoder=decoder,
            sampling=parameters,
            check=check,
            prompter=self._prompter(
                context, keywords, self._sent_as(target, parameters), decoder.type.ending
            ),
        )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values of some fields, which are checked when the copy is used.

        Args:
            update: Values by the names of fields.
            deep: Whether values are copied, too.

        Returns:
            The copy.

        Raises:
            InvalidCall: There is no field of such a name.
        """
        fields = type(self).model_fields
        if unknown := sorted(update.keys() - fields.keys() if update else ()):
            raise InvalidCall(f"{type(self).__name__} has no field {unknown[0]!r}{near(unknown[0], fields)}")
        return super().model_copy(update=update, deep=deep)

    def _check_assigned(self) -> None:
        """Check the fields again, as when the model was made, if any was assigned since."""
        values = [getattr(self, name) for name in type(self).model_fields]
        if len(values) == len(self._checked.values) and all(map(is_, values, self._checked.values)):
            return
        try:
            made = self._made_anew()
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip()
                for each in error.errors(include_input=False, include_url=False)
            )
            raise InvalidCall(f"{self.identifier!r} cannot be used as it is now: {wrong}") from None
        for name in type(self).model_fields:  # a text may have been assigned for a key or a datalayer
            if type(value := getattr(made, name)) is not type(getattr(self, name)):
                self.__dict__[name] = value
        self._checked.values = [getattr(self, name) for name in type(self).model_fields]

    def _made_anew(self) -> ModelFields:
        """Return a model with these fields. Raise `ValidationError` if there cannot be one."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields})

    def _sampling(self, given: Mapping[str, Any], decoder: Decoder) -> dict[str, Any]:
        """The sampling parameters of a call, with the answers' schema unless the caller sets a format."""
        target = self.sampling_target()
        sampling = {**self.predict_kwargs, **given}
        check_sampling(sampling, decoder.type.sampling, legacy=target == "legacy")
        sampling |= decoder.type.sampling
        decoder.repairs.refuse_useless(sampling)
        sampling = decoder.kept.requested(sampling, target)
        schema = None if OUTPUT_FORMATS & sampling.keys() else decoder.schema
        # Servers with the legacy format pass the parameters on unchanged, and vLLM takes no dict there.
        if schema is None or target == "legacy":
            return sampling
        return {**sampling, "response_format": response_format(schema)}

    def _sent_as(self, target: Target, parameters: Mapping[str, Any]) -> bool | None:
        """Whether texts are sent as chat, None if the model decides: always with pictures, audio or video."""
        if not self.media():
            return of_call(self.chat, target, parameters)
        if target in ("legacy", "completions"):
            raise InvalidCall(
                f"{sorted(self.media())} are parts of chat messages, and the path of api_url ({target}) "
                "takes texts: use the server's base URL"
            )
        return True

    def _prompter(
        self, context: Context, keywords: Mapping[str, Any], chat: bool | None, ending: str
    ) -> Prompter:
        return Prompter(
            prompt=self.prompt,
            prompt_func=self.prompt_func,
            signature=self.signature,
            chat=chat,
            system=self.system,
            artifacts={name: load_artifact(a.uri, a.datatype) for name, a in self.artifacts.items()},
            context=context,
            messages_as_json=self.messages_as_json,
            file=load_artifact(self.prompt_file, "str", "prompt_file") if self.prompt_file else None,
            of_pairs=self.task == "score",
            ending=ending,
            media=Media(self.media()) if self.media() else NO_MEDIA,
            keywords=keywords,
        )

    # The functions themselves, with the model as first argument, so that each signature is written only once.
    predict_in_db = tables.predict_in_db
    preview = tables.preview
    estimate = tables.estimate

    @signed_as(run.validate)
    def validate(  # type: ignore[override]  # of pydantic's, deprecated since its version 2
        self, *args: Any, **options: Any
    ) -> ValidationReport:
        """Predict on data sets with known answers, score the answers and record the values.

        The arguments and errors are those of `vllm_tasks.validation.run.validate`.

        Returns:
            The values by data set and metric, compared with the limits. A missed limit raises no error.
        """
        return run.validate(self, *args, **options)

    # ------------------------------------------------------------------ the engine

    def init(self) -> Self:
        """Start the engine now and keep it until `close()`.

        Returns:
            The model itself.

        Raises:
            InvalidCall: The model's fields do not name an engine, or contradict each other.
            EngineFailed: The local engine did not start.
            ServerUnavailable: The Ray cluster could not be joined.
        """
        loop.run(self._lease.hold(self.engine_config(), again=False), raise_if_stopped)
        return self

    def close(self) -> None:
        """Release the engine; it ends when no other model of this process holds it."""
        loop.run(self._lease.let_go(self.engine_config()))

    def __enter__(self) -> Self:
        loop.run(self._lease.hold(self.engine_config(), again=True), raise_if_stopped)
        return self

    def __exit__(self, *_: object) -> None:
        loop.run(self._lease.leave())

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._lease, copied._checked = sharing.Lease(), Checked()
        return copied

    def engine_config(self) -> sharing.Config:
        """Return which engine the model uses and how to reach it.

        Raises:
            InvalidCall: The model's fields do not name an engine, or contradict each other.
        """
        raise NotImplementedError


def _refuse_many(x: Any) -> None:
    """Raise `InvalidCall` for a list of texts, which would be sent as one prompt."""
    if isinstance(x, list | tuple) and x and all(isinstance(each, str) for each in x):
        raise InvalidCall(
            f"predict takes one record, and this is a {type(x).__name__} of {len(x)} texts: "
            "predict_batches answers each; for one prompt of all, join them into a text"
        )
