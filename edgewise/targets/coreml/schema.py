"""The part of Core ML's protobuf schema that an ML Program needs, as message classes.

Apple publishes the schema as `Model.proto`, `FeatureTypes.proto` and `MIL.proto` with coremltools, whose modules import all of it
(and PyTorch, where that is installed). A reader needs some fifty messages, so they are declared here, in a pool of their own:
nothing meets coremltools' classes when both are loaded. Fields that are left out are skipped by the parser, as protobuf prescribes.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "edgewise.coreml"

# Message, number, field, type. `*`: repeated, `->`: a map from names. An enumeration is the same on the wire as int32.
_FIELDS = """
Model                 1   specificationVersion  int32
Model                 2   description           ModelDescription
Model                 502 mlProgram             Program
ModelDescription      1   input                 FeatureDescription *
ModelDescription      10  output                FeatureDescription *
ModelDescription      13  state                 FeatureDescription *
ModelDescription      20  functions             FunctionDescription *
ModelDescription      21  defaultFunctionName   string
ModelDescription      100 metadata              Metadata
Metadata              100 userDefined           string ->
FunctionDescription   1   name                  string
FunctionDescription   2   input                 FeatureDescription *
FunctionDescription   3   output                FeatureDescription *
FunctionDescription   6   state                 FeatureDescription *
FeatureDescription    1   name                  string
FeatureDescription    2   shortDescription      string
FeatureDescription    3   type                  FeatureType
FeatureType           4   imageType             ImageFeatureType
FeatureType           5   multiArrayType        ArrayFeatureType
FeatureType           1000 isOptional           bool
ImageFeatureType      1   width                 int64
ImageFeatureType      2   height                int64
ImageFeatureType      3   colorSpace            int32
ImageFeatureType      21  enumeratedSizes       EnumeratedImageSizes
ImageFeatureType      31  imageSizeRange        ImageSizeRange
EnumeratedImageSizes  1   sizes                 ImageSize *
ImageSize             1   width                 uint64
ImageSize             2   height                uint64
ImageSizeRange        1   widthRange            SizeRange
ImageSizeRange        2   heightRange           SizeRange
ArrayFeatureType      1   shape                 int64 *
ArrayFeatureType      2   dataType              int32
ArrayFeatureType      21  enumeratedShapes      EnumeratedShapes
ArrayFeatureType      31  shapeRange            ShapeRange
EnumeratedShapes      1   shapes                Shape *
Shape                 1   shape                 int64 *
ShapeRange            1   sizeRanges            SizeRange *
SizeRange             1   lowerBound            uint64
SizeRange             2   upperBound            int64
Program               1   version               int64
Program               2   functions             Function ->
Function              1   inputs                NamedValueType *
Function              2   opset                 string
Function              3   block_specializations Block ->
Block                 1   inputs                NamedValueType *
Block                 2   outputs               string *
Block                 3   operations            Operation *
Operation             1   type                  string
Operation             2   inputs                Argument ->
Operation             3   outputs               NamedValueType *
Operation             4   blocks                Block *
Operation             5   attributes            Value ->
Argument              1   arguments             Binding *
Binding               1   name                  string
Binding               2   value                 Value
NamedValueType        1   name                  string
NamedValueType        2   type                  ValueType
ValueType             1   tensorType            TensorType
ValueType             2   listType              ListType
ValueType             3   tupleType             TupleType
ValueType             4   dictionaryType        DictionaryType
ValueType             5   stateType             StateType
TensorType            1   dataType              int32
TensorType            2   rank                  int64
TensorType            3   dimensions            Dimension *
ListType              1   type                  ValueType
ListType              2   length                Dimension
TupleType             1   types                 ValueType *
DictionaryType        1   keyType               ValueType
DictionaryType        2   valueType             ValueType
StateType             1   wrappedType           ValueType
Dimension             1   constant              ConstantDimension
Dimension             2   unknown               UnknownDimension
ConstantDimension     1   size                  uint64
UnknownDimension      1   variadic              bool
Value                 2   type                  ValueType
Value                 3   immediateValue        ImmediateValue
Value                 5   blobFileValue         BlobFileValue
ImmediateValue        1   tensor                TensorValue
ImmediateValue        2   tuple                 TupleValue
ImmediateValue        3   list                  ListValue
ImmediateValue        4   dictionary            DictionaryValue
BlobFileValue         1   fileName              string
BlobFileValue         2   offset                uint64
TupleValue            1   values                Value *
ListValue             1   values                Value *
DictionaryValue       1   values                KeyValuePair *
KeyValuePair          1   key                   Value
KeyValuePair          2   value                 Value
TensorValue           1   floats                RepeatedFloats
TensorValue           2   ints                  RepeatedInts
TensorValue           3   bools                 RepeatedBools
TensorValue           4   strings               RepeatedStrings
TensorValue           5   longInts              RepeatedLongInts
TensorValue           6   doubles               RepeatedDoubles
TensorValue           7   bytes                 RepeatedBytes
RepeatedFloats        1   values                float *
RepeatedDoubles       1   values                double *
RepeatedInts          1   values                int32 *
RepeatedLongInts      1   values                int64 *
RepeatedBools         1   values                bool *
RepeatedStrings       1   values                string *
RepeatedBytes         1   values                bytes
"""

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int64": _Field.TYPE_INT64,
    "uint64": _Field.TYPE_UINT64,
    "int32": _Field.TYPE_INT32,
    "bool": _Field.TYPE_BOOL,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}


def _declared() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="edgewise/coreml.proto", package=_PACKAGE, syntax="proto3")
    messages: dict[str, Any] = {}
    for line in _FIELDS.strip().splitlines():
        owner, number, name, kind, *mark = line.split()
        if owner not in messages:
            messages[owner] = file.message_type.add(name=owner)
        message = messages[owner]
        field = message.field.add(name=name, number=int(number), label=_Field.LABEL_REPEATED if mark else 1)
        if mark == ["->"]:
            # On the wire a map is a repeated message of a key and a value.
            entry = message.nested_type.add(
                name="".join(word[0].upper() + word[1:] for word in name.split("_")) + "Entry"
            )
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, label=1, type=_Field.TYPE_STRING)
            _set_type(entry.field.add(name="value", number=2, label=1), kind)
            kind = f"{owner}.{entry.name}"
        _set_type(field, kind)
    return file


def _set_type(field: Any, kind: str) -> None:
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _messages() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_declared())
    names = {line.split()[0] for line in _FIELDS.strip().splitlines()}
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in names}


MESSAGES = _messages()
"""Message classes by name."""

Model = MESSAGES["Model"]
"""The class of the message that a `.mlmodel` file holds."""
