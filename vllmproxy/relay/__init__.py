"""One exchange: a request's head in, admitted, forwarded, its answer back, settled whatever happened."""
