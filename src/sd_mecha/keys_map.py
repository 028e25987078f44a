"""The key maps, under the module name of release 1."""

from sd_mecha.extensions.key_clauses import Clause as Clause
from sd_mecha.extensions.key_clauses import ComposeObject as ComposeObject
from sd_mecha.extensions.key_clauses import ReqExpr as ReqExpr
from sd_mecha.extensions.key_map import KeyMap as KeyMap
from sd_mecha.extensions.key_map import KeyMapBuilder as KeyMapBuilder
from sd_mecha.extensions.key_map import KeyRelation as KeyRelation
from sd_mecha.extensions.key_map import RealizedKeyRelation as RealizedKeyRelation
from sd_mecha.extensions.key_map import build_keys_map as build_keys_map
