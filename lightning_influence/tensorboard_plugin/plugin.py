"""The plugin: what the page asks for, from the event files that TensorBoard has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import Request

from lightning_influence.page import static_files
from lightning_influence.tensorboard_plugin.events import PLUGIN, AuditError, EventAudits

_JSON = "application/json; charset=utf-8"
_LONGEST = 4096  # characters of an id
_SERVED = (".js", ".css", ".svg")


class InfluencePlugin(base_plugin.TBPlugin):  # type: ignore[misc]  # it has no types
    """Serves the page and the audits of all runs; it only reads, and only what TensorBoard's data provider has.

    Args:
        context: What TensorBoard hands to every plugin.
    """

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider

    def is_active(self) -> bool:
        """Return False: TensorBoard looks itself whether there are data of this plugin."""
        return False

    def frontend_metadata(self) -> Any:
        """Return where the page begins."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="Influence")

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return what answers each address: files of a closed table, and the audits."""
        audits = EventAudits(self._provider)
        apps = {f"/static/{name}": _static(*file) for name, file in static_files().items() if name.endswith(_SERVED)}
        return apps | {
            "/runs": _data(lambda asked: audits.runs(*_where(asked))),
            "/audit": _data(lambda asked: audits.document(*_where(asked), _id(asked))),
            "/pictures": _data(lambda asked: audits.pictures(*_where(asked), _id(asked), _chunk(asked))),
        }


def _static(kind: str, content: bytes) -> Callable[..., Any]:
    return _answering(lambda request: http_util.Respond(request, content, kind))


def _data(make: Callable[[Request], Any]) -> Callable[..., Any]:
    return _answering(lambda request: http_util.Respond(request, make(request), _JSON))


def _answering(respond: Callable[[Request], Any]) -> Callable[..., Any]:
    """Return an application that answers GET, and everything else, or what fails, with the reason."""

    def answer(request: Request) -> Any:
        if request.method != "GET":
            return _refused(request, 405, "only GET is answered here", [("Allow", "GET")])
        try:
            return respond(request)
        except KeyError:
            return _refused(request, 404, "there is no such thing")
        except (errors.NotFoundError, errors.PermissionDeniedError):  # by now something newer may be there
            return _refused(request, 404, "it is not there any more")
        except AuditError as error:
            return _refused(request, 422, str(error))
        except (ValueError, errors.InvalidArgumentError):
            return _refused(request, 400, "the request can't be understood")

    application: Callable[..., Any] = Request.application(answer)
    return application


def _refused(request: Request, code: int, told: str, headers: list[tuple[str, str]] | None = None) -> Any:
    return http_util.Respond(request, {"error": told}, _JSON, code=code, headers=headers)


def _where(request: Request) -> tuple[Any, str]:
    """Return whom TensorBoard has told to ask, and in which experiment."""
    return plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)


def _id(request: Request) -> str:
    found = request.args.getlist("id")
    if len(found) != 1 or not 0 < len(found[0]) <= _LONGEST:
        raise ValueError("id")
    return found[0]


def _chunk(request: Request) -> int:
    found = request.args.getlist("chunk")
    if len(found) != 1 or not (found[0].isascii() and found[0].isdecimal() and len(found[0]) < 7):
        raise ValueError("chunk")
    return int(found[0])
