"""TFLite models put together: parts in a row as one signature, several signatures in one file."""

import hashlib

from keras_flexast.export.tflite_metadata import pack_model, set_entry, unpack_model


def join_parts(chains):
    """One model of several: the parts of each signature in a row, equal constants held once.

    Args:
        chains: {signature: (input names, [TFLite bytes, ...])}. Every part has one subgraph and
            one signature; it takes tensors by the names under which earlier parts give them.
            The last part gives `scores`.

    Returns:
        TFLite bytes with a subgraph and a signature for each chain, in their order. An
        interpreter that does not know signatures runs the first one.
    """
    joined = _JoinedModel()
    for name, (inputs, parts) in chains.items():
        joined.add_chain(name, inputs, [unpack_model(part) for part in parts])
    return pack_model(joined.finished())


class _JoinedModel:
    """A TFLite model that grows by subgraphs and holds equal constants once."""

    def __init__(self):
        from tensorflow.lite.python import schema_py_generated as schema

        self.schema = schema
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "keras_flexast"
        self.model.subgraphs, self.model.signatureDefs = [], []
        self.model.buffers = [schema.BufferT()]  # of tensors without constants
        self.model.operatorCodes = []
        self.buffers, self.codes = {}, {}  # places in model.buffers and model.operatorCodes
        self.runtimes = []  # oldest runtime of each part, as b"1.5.0"

    def add_chain(self, name, inputs, parts):
        """Add a subgraph and a signature of ModelT parts, each of which feeds the next one."""
        graph = self.schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = name, [], []
        known = {}  # name: index of its tensor
        for part in parts:
            self._append(graph, part, known)
        graph.inputs = [known[one] for one in inputs]
        graph.outputs = [known["scores"]]
        for one in (*inputs, "scores"):
            graph.tensors[known[one]].name = one
        signature = self.schema.SignatureDefT()
        signature.signatureKey = name
        signature.subgraphIndex = len(self.model.subgraphs)
        signature.inputs = [self._entry(one, known[one]) for one in inputs]
        signature.outputs = [self._entry("scores", known["scores"])]
        self.model.subgraphs.append(graph)
        self.model.signatureDefs.append(signature)

    def finished(self):
        """ModelT, with the newest of the runtimes that its parts need."""
        newest = max(
            self.runtimes,
            key=lambda text: [int(number) for number in text.rstrip(b"\0").split(b".")],
        )
        set_entry(self.model, "min_runtime_version", newest)
        return self.model

    def _append(self, graph, part, known):
        """Append the only subgraph of a part; `known` gains the names of what goes in and out."""
        (piece,), (signature,) = part.subgraphs, part.signatureDefs
        moved = {-1: -1}  # stands for an input that is left out
        for entry in signature.inputs:
            if entry.name.decode() in known:
                moved[entry.tensorIndex] = known[entry.name.decode()]
        for index, tensor in enumerate(piece.tensors):
            if index not in moved:
                moved[index] = len(graph.tensors)
                tensor.buffer = self._place_of(part.buffers[tensor.buffer])
                graph.tensors.append(tensor)
        for operator in piece.operators:
            operator.opcodeIndex = self._code_of(part.operatorCodes[operator.opcodeIndex])
            operator.inputs = [moved[index] for index in operator.inputs]
            operator.outputs = [moved[index] for index in operator.outputs]
            graph.operators.append(operator)
        for entry in (*signature.inputs, *signature.outputs):
            known[entry.name.decode()] = moved[entry.tensorIndex]
        for entry in part.metadata:
            if entry.name == b"min_runtime_version":
                self.runtimes.append(bytes(part.buffers[entry.buffer].data))

    def _place_of(self, buffer):
        """Index of a buffer in the model, where an equal one may be already."""
        if buffer.data is None or not len(buffer.data):
            return 0
        content = hashlib.sha256(buffer.data).digest()
        if content not in self.buffers:
            self.buffers[content] = len(self.model.buffers)
            self.model.buffers.append(buffer)
        return self.buffers[content]

    def _code_of(self, code):
        """Index of an operator code in the model, where an equal one may be already."""
        key = (code.builtinCode, code.customCode, code.version)
        if key not in self.codes:
            self.codes[key] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        return self.codes[key]

    def _entry(self, name, tensor):
        """TensorMapT from a name in a signature to the index of a tensor."""
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry
