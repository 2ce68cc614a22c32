"""The JSON Schema of job files, from the classes in job.py. Pure."""

from __future__ import annotations

from typing import Any

from imagend.job import JOB_SCHEMA, SPECS, Header


def schema_of_job_file() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of job files; `signature`, the last member, is added by signing."""
    variants = []
    for kind, spec in SPECS.items():
        header, own = Header.model_json_schema(), spec.model_json_schema()
        variants.append(
            {
                "title": kind,
                "description": spec.__doc__,
                "type": "object",
                "properties": header["properties"]
                | {"kind": {"const": kind, "description": header["properties"]["kind"]["description"]}}
                | own["properties"]
                | {"signature": {"type": "string", "contentEncoding": "base64", "description": "SSHSIG, always last."}},
                "required": [*header["required"], *own.get("required", ())],
                "additionalProperties": False,
                "$defs": header.get("$defs", {}) | own.get("$defs", {}),
            }
        )
    definitions = {name: value for variant in variants for name, value in variant.pop("$defs").items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": JOB_SCHEMA,
        "title": "imagend job file",
        "oneOf": variants,
        "$defs": definitions,
    }
