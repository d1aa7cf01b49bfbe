"""What TensorRT can do with an ONNX graph: the table that `lint` reads.

`SUPPORTED` is what NVIDIA's parser says of itself (`OnnxParser.supports_operator`, TensorRT-RTX 1.7) of all ops up to opset 20;
`LATER` takes out what the parser of TensorRT 10.3 (JetPack 6.1 and 6.2) did not have yet, by
https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md.
"""

from __future__ import annotations

SUPPORTED = frozenset(
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BlackmanWindow Cast CastLike Ceil "  # noqa: SIM905
    "Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum "
    "Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool "
    "GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax "
    "Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop "
    "LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not "
    "OneHot Or PRelu Pad Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal "
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
    "Reshape Resize ReverseSequence RoiAlign Round STFT Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin "
    "Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK "
    "Transpose Trilu Unsqueeze Upsample Where Xor".split()
)
LATER = {"BlackmanWindow": "10.4", "HammingWindow": "10.4", "HannWindow": "10.4", "STFT": "10.5"}
"""Ops that came after the oldest TensorRT that artifacts are for, and with which version."""
DATA_DEPENDENT = frozenset({"NonZero", "NonMaxSuppression", "Unique", "Compress"})
"""Ops whose result has as many entries as the data say."""
LOOPS = frozenset({"Loop", "Scan", "If"})

OPSET = 20
"""The last opset that TensorRT before 10.9 reads, and so JetPack 6."""
FOUR_BITS_NEED = "weights of 4 bits need opset 21, which TensorRT reads from 10.9 on: JetPack 7, and not 6"

MOST_PICKED = 3840
"""The largest K of TopK."""
MOST_DIMENSIONS = 8
TYPES = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL"})
"""Types that values may have in the graph, besides quantised ones."""
ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Min", "Max", "Pow", "ReduceSum", "CumSum", "MatMul"})
"""Ops that compute with numbers, and cost twice as much on 64 bits as on 32."""
BETWEEN_PRODUCTS = frozenset({"Cast", "Mul", "Div", "Add", "Where", "Reshape"})
"""What may stand between the first product of an attention and its softmax in one fused kernel: scale and mask."""
