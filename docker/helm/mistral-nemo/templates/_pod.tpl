{{- /* The pod of the Deployment and of the StatefulSet. */ -}}
{{- define "nemo.pod" -}}
metadata:
  labels:
    {{- include "nemo.selectorLabels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: server
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "nemo.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  terminationGracePeriodSeconds: {{ add .Values.drain.endpointDelaySeconds .Values.drain.graceSeconds .Values.drain.marginSeconds }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.topologySpread.enabled }}
  topologySpreadConstraints:
    - topologyKey: {{ .Values.topologySpread.topologyKey }}
      maxSkew: {{ .Values.topologySpread.maxSkew }}
      whenUnsatisfiable: {{ .Values.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "nemo.selectorLabels" . | nindent 10 }}
  {{- end }}
  {{- if include "nemo.downloads" . }}
  initContainers:
    - name: download
      image: {{ include "nemo.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [download]
      env:
        {{- include "nemo.modelEnvironment" . | trim | nindent 8 }}
        {{- with .Values.model.hfTokenSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef:
              name: {{ . }}
              key: HF_TOKEN
        {{- end }}
      securityContext:
        {{- toYaml .Values.containerSecurityContext | nindent 8 }}
      resources:
        requests: {cpu: 500m, memory: 1Gi}
        limits: {memory: 4Gi}
      volumeMounts:
        - {name: models, mountPath: {{ .Values.model.mountPath }}}
        - {name: tmp, mountPath: /tmp}
  {{- end }}
  containers:
    - name: server
      image: {{ include "nemo.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve]
      env:
        {{- include "nemo.modelEnvironment" . | trim | nindent 8 }}
        - {name: HTTP_PORT, value: {{ .Values.service.httpPort | quote }}}
        - {name: GRPC_PORT, value: {{ .Values.service.grpcPort | quote }}}
        - {name: METRICS_PORT, value: {{ .Values.service.metricsPort | quote }}}
        - {name: GRACE_S, value: {{ .Values.drain.graceSeconds | quote }}}
        {{- if .Values.gpu.count }}
        - {name: REQUIRE_GPU, value: "1"}
        {{- end }}
        {{- if include "nemo.isHub" . }}
        - {name: HF_HUB_OFFLINE, value: "1"}
        {{- end }}
        - {name: NIM_SERVER_PORT, value: {{ ternary (toString .Values.openai.port) "0" .Values.openai.enabled | quote }}}
        {{- with .Values.model.servedName }}
        - {name: NIM_SERVED_MODEL_NAME, value: {{ . | quote }}}
        {{- end }}
        {{- if .Values.model.maxModelLen }}
        - {name: NIM_MAX_MODEL_LEN, value: {{ .Values.model.maxModelLen | quote }}}
        {{- end }}
        {{- if .Values.tls.grpc.enabled }}
        - {name: GRPC_TLS_CERT, value: /tls/grpc/tls.crt}
        - {name: GRPC_TLS_KEY, value: /tls/grpc/tls.key}
        {{- with .Values.tls.grpc.clientCaKey }}
        - {name: GRPC_TLS_CLIENT_CA, value: /tls/grpc/{{ . }}}
        {{- end }}
        {{- end }}
        {{- if .Values.tls.openai.enabled }}
        - {name: NIM_SSL_CERTS_PATH, value: /tls/openai/tls.crt}
        - {name: NIM_SSL_KEY_PATH, value: /tls/openai/tls.key}
        {{- end }}
        {{- range $name, $value := .Values.settings }}
        - {name: NEMO_{{ upper $name }}, value: {{ $value | toString | quote }}}
        {{- end }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        - {name: http, containerPort: {{ .Values.service.httpPort }}}
        - {name: grpc, containerPort: {{ .Values.service.grpcPort }}}
        - {name: metrics, containerPort: {{ .Values.service.metricsPort }}}
        {{- if .Values.openai.enabled }}
        - {name: openai, containerPort: {{ .Values.openai.port }}}
        {{- end }}
      {{- range $name := list "startupProbe" "readinessProbe" "livenessProbe" }}
      {{- $probe := get $.Values $name }}
      {{- if $probe.enabled }}
      {{ $name }}:
        httpGet:
          path: {{ $probe.path }}
          port: http
        {{- omit $probe "enabled" "path" | toYaml | nindent 8 }}
      {{- end }}
      {{- end }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ .Values.drain.endpointDelaySeconds | quote }}]
      securityContext:
        {{- toYaml .Values.containerSecurityContext | nindent 8 }}
      resources:
        {{- $resources := deepCopy .Values.resources }}
        {{- if .Values.gpu.count }}
        {{- $_ := set $resources "limits" (merge (dict .Values.gpu.resource .Values.gpu.count) (default dict $resources.limits)) }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: {{ .Values.model.mountPath }}, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- range $name := list "grpc" "openai" }}
        {{- if (get $.Values.tls $name).enabled }}
        - {name: tls-{{ $name }}, mountPath: /tls/{{ $name }}, readOnly: true}
        {{- end }}
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 4Gi}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
    {{- if .Values.persistence.enabled }}
    {{- if not (include "nemo.claimPerReplica" .) }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-models" (include "nemo.fullname" .)) .Values.persistence.existingClaim }}
    {{- end }}
    {{- else if .Values.hostPath.enabled }}
    - name: models
      hostPath: {path: {{ .Values.hostPath.path }}, type: DirectoryOrCreate}
    {{- else if .Values.nfs.enabled }}
    - name: models
      nfs: {server: {{ .Values.nfs.server }}, path: {{ .Values.nfs.path }}, readOnly: {{ .Values.nfs.readOnly }}}
    {{- else }}
    - name: models
      emptyDir: {sizeLimit: {{ .Values.emptyDir.sizeLimit }}}
    {{- end }}
    {{- range $name := list "grpc" "openai" }}
    {{- $tls := get $.Values.tls $name }}
    {{- if $tls.enabled }}
    - name: tls-{{ $name }}
      secret: {secretName: {{ $tls.secretName }}, defaultMode: 0440}
    {{- end }}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "nemo.modelEnvironment" -}}
{{- with .Values.model.name }}
- {name: NIM_MODEL_PATH, value: {{ . | quote }}}
{{- end }}
- {name: NIM_CACHE_PATH, value: {{ .Values.model.mountPath | quote }}}
- {name: NIM_LOG_LEVEL, value: {{ upper .Values.model.logLevel | quote }}}
- {name: NIM_JSONL_LOGGING, value: {{ ternary "1" "0" .Values.model.jsonLogging | quote }}}
{{- end -}}

{{- define "nemo.claim" -}}
accessModes: [{{ .Values.persistence.accessMode }}]
{{- with .Values.persistence.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.persistence.size }}
{{- end -}}
