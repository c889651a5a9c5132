"""What ``twistd`` lists; each module is imported only when its command is asked for."""

from twisted.application.service import ServiceMaker

vllmproxy = ServiceMaker(
    "vllmproxy",
    "vllmproxy.tap",
    "A transparent gateway in front of vLLM, behind virtual keys",
    "vllmproxy",
)

vllmsim = ServiceMaker(
    "vllmsim",
    "vllmproxy.simulator.tap",
    "A vLLM that needs no GPU: plausible answers, failures on demand",
    "vllmsim",
)
