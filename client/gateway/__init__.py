"""The OpenAI gateway: NIM's HTTP contract in front of the ensemble, as a service of its own."""

VERSION = "0.1.0"
