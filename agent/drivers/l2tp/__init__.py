"""L2TP over IPsec: charon for the keys, xl2tpd for the tunnels, one pppd for each session."""

from agent.drivers.l2tp.driver import L2tp as L2tp
